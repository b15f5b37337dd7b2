"""Softmax attention with a sink or within a window on PyTorch's fused kernels, in O(T) memory.

    y_i = Σ_j exp(s[i,j]) v_j / (exp(c) + Σ_l exp(s[i,l])),   s = scale · q·k, |i - j| < window

The definition is `headwise.functional.softmax_attention`. The kernels do not support sinks, but they return
the log-sum-exp of each query, which suffices. With `y, lse` of attention without a sink,

    y' = y · sigmoid(lse - c)        lse' = log(exp(lse) + exp(c))

is attention with one more key, whose logit is c and whose value is 0. A kernel's backward pass computes the
weights `exp(s - lse')` and the correction `rowsum(dy' · y')`. Given y' and lse', both belong to the softmax
with the sink, so the gradients of q, k and v are correct. Only the gradient of the sink has to be added:
dc = -Σ_i exp(c - lse'_i) rowsum(dy'_i · y'_i).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.functional.fused_attention.backends import attention

WIDEST = 256
"""Head width that the kernels take on a GPU."""


def takes(q: Tensor, bias: Tensor | None, *, window: int | None = None) -> bool:
    """Whether `fused_attention` has a kernel for these: no gradient of the bias, on a GPU widths of 8·n.

    Args:
        q: `(B, H, T, D)`.
        window: None where there is none; on a GPU only 16-bit kernels know one, and no bias with it.
    """
    if bias is not None and bias.requires_grad:
        return False
    if not q.is_cuda:
        return q.device.type == "cpu" and window is None
    if q.shape[-1] % 8 or q.shape[-1] > WIDEST:
        return False
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and bias is None if window is not None else half or q.dtype == torch.float32


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of what `takes` accepts.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, K, T, D)` with `H % K == 0`.
        causal: query i sees keys j <= i only; not together with `bias`, which has causality in it.
        scale: factor on q·k.
        bias: `(B or 1, 1 or H, T, T)`, added to the scores; without gradients.
        sink: logits `(H,)`, one more in each query's denominator; None where there is none.
        window: query i sees the keys with |i - j| < window; None sees all.

    Returns:
        `(B, H, T, D)`.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    if k.shape[1] != q.shape[1] and (not q.is_cuda or bias is not None or q.dtype == torch.float32):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if bias is not None:
        bias = bias.to(q.dtype)
    y: Tensor = attention(q, k, v, bias, sink, causal, window or 0, scale)[0]
    return y


def null_key_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    *,
    causal: bool,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The same with a sink, for what no kernel takes: one key of zeros whose logit the mask adds, O(T²).

    Arguments as of `fused_attention`; `dropout` is the share of weights dropped.
    """
    group, length = q.shape[1] // k.shape[1], q.shape[-2]
    k, v = (F.pad(x.to(q.dtype).repeat_interleave(group, dim=1), (0, 0, 0, 1)) for x in (k, v))
    if bias is None:
        bias = q.new_zeros(1, 1, length, length)
        if causal:
            hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            bias = bias.masked_fill(hidden, -torch.inf)
    bias = bias.to(q.dtype).expand(-1, q.shape[1], -1, -1)
    null = sink.to(q.dtype)[:, None, None].expand(*bias.shape[:3], 1)
    mask = torch.cat((bias, null), dim=-1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


def _flops(q: Sequence[int], v: Sequence[int], window: int) -> int:
    """Scores and values over the keys of the window, or over all of them where it is 0."""
    batch, heads, tokens, width = q
    return 2 * batch * heads * tokens * min(tokens, window or tokens) * (width + v[-1])


def _forward_flops(
    q: Any, k: Any, v: Any, bias: Any, sink: Any, causal: bool, window: int, *_: Any, **__: Any
) -> int:
    return _flops(q, v, window)


def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **__: Any) -> int:
    """Twice the forward: scores that a kernel computes again are not counted, by the usual convention."""
    return 2 * _flops(q, v, rest[-2])


FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.headwise.attention_with_lse: _forward_flops,
    torch.ops.headwise.attention_with_lse_backward: _backward_flops,
}
"""For torch's FlopCounterMode, which does not see the products inside the operators."""
