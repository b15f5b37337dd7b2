"""`flash`: softmax attention on PyTorch's fused kernels (Dao et al. 2022), O(T) memory.

    y_i = Σ_j softmax_j(scale · q_i·k_j + mask) v_j

`scaled_dot_product_attention` chooses among cuDNN, FlashAttention and memory-efficient kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwise.attention.base import Attention, register
from headwise.attention.observation import Observation
from headwise.functional.softmax_attention import additive_mask, zero_rows

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""In the order tried on a GPU: on Hopper cuDNN's kernels are the fastest of the three."""


@register("flash")
class FlashAttention(Attention):
    """Softmax attention on fused kernels."""

    supports = frozenset({"causal", "full", "padding", "additive_mask", "gqa", "dropout", "cpu_training"})
    engine_family = "sdpa"

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        bias = empty = None
        if mask is not None:
            bias, empty = additive_mask(mask, causal=causal, length=q.shape[-2], like=q)
        arguments = {
            "attn_mask": bias,
            "dropout_p": self.dropout(),
            "is_causal": causal and bias is None,
            "scale": self.scale,
            "enable_gqa": k.shape[1] != q.shape[1],
        }
        if not q.is_cuda:
            self.record_engine("sdpa")
            return zero_rows(F.scaled_dot_product_attention(q, k, v, **arguments), empty)
        if arguments["enable_gqa"] and q.dtype == torch.float32:  # no fused float32 kernel shares keys
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            arguments["enable_gqa"] = False
        with sdpa_kernel(BACKENDS, set_priority=True):
            if not torch.compiler.is_compiling():
                choice = SDPBackend(torch._fused_sdp_choice(q, k, v, **arguments))
                self.record_engine(f"sdpa-{choice.name.split('_')[0].lower()}")
            return zero_rows(F.scaled_dot_product_attention(q, k, v, **arguments), empty)

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
