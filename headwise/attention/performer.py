"""`performer`: softmax attention estimated by random features, FAVOR+ (Choromanski et al. 2021).

    exp(scale · q·k) ≈ φ(q)·φ(k),  φ(x)_f = exp(w_f·x' - ‖x'‖²/2),  x' = √scale · x

The rest is as for `linear`: time and memory linear in T, decoding with one state. The directions w are drawn
once, from `seed` and the layer's number, and saved with the weights; training does not draw them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwise.attention.base import AttentionShape
from headwise.attention.kinds import register
from headwise.attention.linear.layer import FeatureAttention
from headwise.errors import in_range
from headwise.functional.linear_attention import orthogonal_features, positive_features


@dataclass
class PerformerConfig:
    """Random features.

    Attributes:
        features: random features of a head, F; more estimate the softmax better.
        seed: seed of their directions.
    """

    features: int = 128
    seed: int = 0

    def validate_values(self) -> None:
        """Refuse what has no meaning, also where another kind is chosen.

        Raises:
            HeadwiseError: a number out of its range.
        """
        in_range("model.attention.performer.features", self.features, 1, 2**14)
        in_range("model.attention.performer.seed", self.seed, 0, 2**31 - 1)


@register("performer")
class PerformerAttention(FeatureAttention):
    """Attention with positive orthogonal random features."""

    options = PerformerConfig
    engine_family = "performer"
    directions: Tensor

    def __init__(self, shape: AttentionShape, options: PerformerConfig | None = None) -> None:
        super().__init__(shape, options)
        self.config = options or PerformerConfig()
        seed = self.config.seed * 4096 + shape.layer  # no two layers alike
        directions = orthogonal_features(self.config.features, shape.head_dim, seed)
        self.register_buffer("directions", directions.to(next(self.parameters()).device))

    def queries(self, q: Tensor) -> Tensor:
        """Features of queries."""
        return positive_features(q, self.directions, scale=self.scale, of_queries=True)

    def keys(self, k: Tensor) -> Tensor:
        """Features of keys."""
        return positive_features(k, self.directions, scale=self.scale, of_queries=False)

    @classmethod
    def n_features(cls, shape: AttentionShape, options: Any) -> int:
        """As given."""
        return int((options or PerformerConfig()).features)

    @classmethod
    def feature_flops(cls, shape: AttentionShape, options: Any) -> int:
        """Projections of q and k on the directions."""
        heads = shape.n_heads + shape.n_kv_heads
        return 2 * heads * shape.head_dim * cls.n_features(shape, options)

    @classmethod
    def backward_flops_per_token(cls, shape: AttentionShape, options: Any, seq_len: int) -> int:
        """Two products for each of the forward pass, and one for features: directions are not trained."""
        forward = cls.flops_per_token(shape, options, seq_len)
        return 2 * forward - cls.feature_flops(shape, options)
