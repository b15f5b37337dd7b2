"""`mha`: softmax attention with the scores in memory, the vanilla baseline (Vaswani et al. 2017).

    y_i = Σ_j softmax_j(scale · q_i·k_j + mask) v_j

Equal to `torch.nn.MultiheadAttention` with the same weights; O(T²) memory per head.
"""

from __future__ import annotations

from torch import Tensor

from headwise.attention.base import SoftmaxAttention
from headwise.attention.kinds import register
from headwise.attention.modifiers import MODIFIERS
from headwise.functional.softmax_attention import softmax_attention


@register("mha")
class VanillaAttention(SoftmaxAttention):
    """Softmax attention as written down."""

    supports = frozenset(
        {"causal", "full", "padding", "additive_mask", "gqa", "dropout", "cpu_training", *MODIFIERS}
    )
    engine_family = "eager"

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        self.record_engine("eager")
        return softmax_attention(
            q, k, v, causal=causal, mask=mask, scale=self.scale, dropout=self.dropout(), sink=self.sink(),
            window=self.window(q.shape[-2]),
        )  # fmt: skip
