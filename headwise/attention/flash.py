"""`flash`: softmax attention on PyTorch's fused kernels (Dao et al. 2022), O(T) memory.

    y_i = Σ_j softmax_j(scale · q_i·k_j + mask) v_j

`scaled_dot_product_attention` chooses among cuDNN, FlashAttention and memory-efficient kernels. Under a sink
the same kernels compute (`headwise.functional.fused_attention`); a window without another mask is left to
FlashAttention on a GPU, where it costs O(T · window), and is a mask elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwise.attention.base import SoftmaxAttention
from headwise.attention.kinds import register
from headwise.attention.modifiers import MODIFIERS
from headwise.functional.fused_attention import FLOP_FORMULAS, fused_attention, null_key_attention, takes
from headwise.functional.softmax_attention import additive_mask, windowed, zero_rows

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""In the order tried on a GPU: on Hopper cuDNN's kernels are the fastest of the three."""


@register("flash")
class FlashAttention(SoftmaxAttention):
    """Softmax attention on fused kernels."""

    supports = frozenset(
        {"causal", "full", "padding", "additive_mask", "gqa", "dropout", "cpu_training", *MODIFIERS}
    )
    engine_family = "sdpa"
    flop_formulas = FLOP_FORMULAS

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        bias = empty = None
        sink, window = self.sink(), self.window(q.shape[-2])
        if window is not None and (mask is not None or self.dropout() or not takes(q, None, window=window)):
            mask, window = windowed(mask, window, q.shape[-2], q.device), None
        if mask is not None:
            bias, empty = additive_mask(mask, causal=causal, length=q.shape[-2], like=q)
        if sink is not None or window is not None:
            y = self.modified(q, k, v, bias, sink, causal=causal and bias is None, window=window)
            return zero_rows(y, empty)
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

    def modified(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sink: Tensor | None,
        *,
        causal: bool,
        window: int | None,
    ) -> Tensor:
        """Attention under a sink, or within a window that a kernel knows; `causal` where `bias` lacks it."""
        if sink is None or (not self.dropout() and takes(q, bias, window=window)):
            self.record_engine("sdpa-lse")
            return fused_attention(
                q, k, v, causal=causal, scale=self.scale, bias=bias, sink=sink, window=window
            )
        self.record_engine("sdpa-null")
        return null_key_attention(
            q, k, v, sink, causal=causal, scale=self.scale, bias=bias, dropout=self.dropout()
        )
