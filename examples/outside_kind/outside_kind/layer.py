"""`nothing`: softmax attention with one more logit, whose weight goes to no key (Miller 2023).

    y_i = Σ_j exp(s[i,j]) / (exp(c) + Σ_l exp(s[i,l])) v_j

Each head learns its own c, which starts at `offset`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headwise.attention import Attention, AttentionShape, register
from headwise.attention.cache import LayerCache
from headwise.attention.observation import Observation
from headwise.errors import HeadwiseError
from headwise.measures.spec import Measure
from outside_kind.cache import NothingCache
from outside_kind.functional import log_sum_exp, nothing_attention, takes_kernel


@dataclass
class NothingConfig:
    """model.attention.nothing.*

    Attributes:
        offset: c of every head at the start.
        learned: whether c is learned.
    """

    offset: float = 0.0
    learned: bool = True

    def validate_values(self) -> None:
        """Refuse what has no meaning, also where another kind is chosen.

        Raises:
            HeadwiseError: an offset that is not finite.
        """
        if not math.isfinite(self.offset):
            raise HeadwiseError(f"model.attention.nothing.offset is {self.offset}; give a finite number")


@register("nothing")
class NothingAttention(Attention):
    """Softmax attention that may attend to nothing."""

    options = NothingConfig
    supports = frozenset({"causal", "full", "padding", "additive_mask", "gqa", "cpu_training"})
    engine_family = "nothing"
    measures = (
        Measure("nothing_weight", "weight on nothing", "exp(c) / (exp(c) + Σ_j exp(s[i,j]))", source="layer"),
        Measure("nothing_lead", "lead of the keys", "log Σ_j exp(s[i,j]) - c", "nats", source="layer"),
    )
    sections = ("outside_kind.section:NOTHING",)
    benchmarks: ClassVar[Mapping[str, str]] = {"nothing": "outside_kind.bench"}

    def __init__(self, shape: AttentionShape, options: NothingConfig | None = None) -> None:
        super().__init__(shape, options)
        self.config = options or NothingConfig()
        self.offset = nn.Parameter(torch.empty(shape.n_heads), requires_grad=self.config.learned)
        self.initialise()

    def initialise(self) -> None:
        """Start every head at the same offset."""
        nn.init.constant_(self.offset, self.config.offset)

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        """Attend; forward passes without a mask or gradients run on the kernel."""
        self.record_engine("nothing-kernel" if takes_kernel(q, k, v, mask, causal) else "nothing-plain")
        return nothing_attention(q, k, v, self.offset, mask=mask, causal=causal, scale=self.scale)

    def observation(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_pre: Tensor,
        k_pre: Tensor,
        *,
        mask: Tensor | None,
        causal: bool,
    ) -> Observation:
        """The softmax over the keys, whose weights sum to 1, and what this kind measures itself."""
        seen = self.softmax_scores(q, k, q_pre, k_pre, mask=mask, causal=causal)
        lead = log_sum_exp(q, k, mask=mask, causal=causal, scale=self.scale) - self.offset.detach()[:, None]
        return replace(seen, extra={"nothing_weight": torch.sigmoid(-lead), "nothing_lead": lead})

    def undecodable(self) -> str | None:
        """Nothing speaks against decoding."""
        return None

    def cache(self, batch: int, slots: int, length: int, like: Tensor) -> LayerCache:
        """Keys and values of the last tokens."""
        return NothingCache(self, batch, slots, length, like)

    @classmethod
    def flops_per_token(cls, shape: AttentionShape, options: Any, seq_len: int) -> int:
        """Scores and values over all keys, as for any softmax attention; the extra logit is no product."""
        return super().flops_per_token(shape, options, seq_len)

    @classmethod
    def head_ranges(cls, leaf: str, index: int, options: Any) -> dict[int, list[tuple[int, int]]]:
        """A head has one entry of `offset`."""
        return {0: [(index, index + 1)]} if leaf == "offset" else {}
