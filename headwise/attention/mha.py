"""`mha`: softmax attention with the scores in memory, the vanilla baseline (Vaswani et al. 2017).

    y_i = Σ_j softmax_j(scale · q_i·k_j + mask) v_j

Equal to `torch.nn.MultiheadAttention` with the same weights; O(T²) memory per head.
"""

from __future__ import annotations

from torch import Tensor

from headwise.attention.base import Attention, register
from headwise.attention.observation import Observation
from headwise.functional.softmax_attention import softmax_attention


@register("mha")
class VanillaAttention(Attention):
    """Softmax attention as written down."""

    supports = frozenset({"causal", "full", "padding", "additive_mask", "gqa", "dropout", "cpu_training"})
    engine_family = "eager"

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        self.record_engine("eager")
        return softmax_attention(q, k, v, causal=causal, mask=mask, scale=self.scale, dropout=self.dropout())

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
        """Its softmax scores."""
        return self.softmax_scores(q, k, q_pre, k_pre, mask=mask, causal=causal)
