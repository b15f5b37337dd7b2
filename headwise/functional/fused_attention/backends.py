"""PyTorch's attention kernels with their log-sum-exp, forward and backward, as one operator.

The operator is opaque to `torch.compile`. Which kernel computes depends on shapes, strides and dtype alone,
so that the backward pass finds the same one. There is no dropout: seeds are never read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwise.functional.dispatch import HAS_KERNELS
from headwise.functional.layout import room_by_token

ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""In the order tried: on Hopper cuDNN's kernels are the fastest of the three."""

PADDED = 32
"""The memory-efficient kernel's log-sum-exp has a multiple of these numbers for each head."""

_cudnn_dims = [4]
"""Dimensions of the log-sum-exp that cuDNN's forward pass gave last: 4 or 3, by the version of PyTorch."""


def backend(q: Tensor, k: Tensor, v: Tensor, *, biased: bool, causal: bool, window: int, scale: float) -> str:
    """`cpu`, `window`, `efficient`, `cudnn` or `flash`: which kernel computes."""
    if not q.is_cuda:
        return "cpu"
    if window:
        return "window"
    if biased or q.dtype == torch.float32:
        return "efficient"
    with sdpa_kernel(ORDER, set_priority=True):
        choice = torch._fused_sdp_choice(
            q, k, v, attn_mask=None, dropout_p=0.0, is_causal=causal, scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )  # fmt: skip
    return SDPBackend(choice).name.split("_")[0].lower()


@torch.library.custom_op("headwise::attention_with_lse", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sink: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention under a sink or within a window.

    Args:
        q, k, v, bias, sink, causal, scale: as of `fused_attention`.
        window: 0 for none.

    Returns:
        y `(B, H, T, D)`, laid out `(B, T, H, D)`; the log-sum-exp of each query, sink included, `(B, H, T)`.
    """
    q, k, v = _readable(q), _readable(k), _readable(v)
    name = backend(q, k, v, biased=bias is not None, causal=causal, window=window, scale=scale)
    y, lse = _forward(name, q, k, v, bias, causal, window, scale)
    if sink is None:
        return _laid_out(y), lse.contiguous()
    if q.is_cuda and HAS_KERNELS:
        from headwise.functional.fused_attention.kernel import apply_sink

        return apply_sink(y, lse, sink)
    total = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
    keeps = (lse - total).exp()
    return _laid_out((y.to(keeps.dtype) * keeps[..., None]).to(y.dtype)), total.contiguous()


@attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return room_by_token(q), q.new_empty(q.shape[:3], dtype=_precise(q))


@torch.library.custom_op("headwise::attention_with_lse_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sink: Tensor | None,
    y: Tensor,
    lse: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the sink, `(H,)` float32 or better; empty where there is none."""
    grad = grad if grad.stride() == y.stride() else room_by_token(y).copy_(grad)
    given = (q, k, v)
    grad, q, k, v = _readable(grad), _readable(q), _readable(k), _readable(v)
    name = backend(q, k, v, biased=bias is not None, causal=causal, window=window, scale=scale)
    dq, dk, dv = _backward(name, grad, q, k, v, bias, y, lse, causal, window, scale)
    dq, dk, dv = (_like(x, of) for x, of in zip((dq, dk, dv), given, strict=True))
    if sink is None:
        return dq, dk, dv, lse.new_empty(0)
    if q.is_cuda and HAS_KERNELS:
        from headwise.functional.fused_attention.kernel import sink_gradient

        return dq, dk, dv, sink_gradient(y, grad, lse, sink)
    delta = (y.to(lse.dtype) * grad.to(lse.dtype)).sum(-1)
    weight = (sink.to(lse.dtype)[:, None] - lse).exp()
    return dq, dk, dv, -(weight * delta).sum((0, 2))


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, sink: Any, y: Tensor, lse: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = lse.new_empty(0 if sink is None else q.shape[1])
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), own


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, bias, sink, ctx.causal, ctx.window, ctx.scale = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, sink, y, lse)


def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, bias, sink, y, lse = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    dq, dk, dv, own = attention_backward(grad, q, k, v, bias, sink, y, lse, ctx.causal, ctx.window, ctx.scale)
    return dq, dk, dv, None, None if sink is None else own.to(sink.dtype), None, None, None


attention.register_autograd(_gradients, setup_context=_save)


def _forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """y `(B, H, T, D)` in any layout and the natural log-sum-exp, `(B, H, T)`."""
    aten, length = torch.ops.aten, q.shape[2]
    if name == "cpu":
        y, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
        return y, lse
    if name == "window":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y, lse = aten._flash_attention_forward(
            q, k, v, None, None, length, length, 0.0, causal, False, scale=scale,
            window_size_left=window - 1, window_size_right=0 if causal else window - 1,
        )[:2]  # fmt: skip
        return y.transpose(1, 2), lse
    if name == "cudnn":
        y, lse = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )[:2]
        _cudnn_dims[0] = lse.dim()
        return y, lse.reshape(q.shape[:3])
    if name == "flash":
        y, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
        return y, lse
    y, lse = aten._scaled_dot_product_efficient_attention(
        q, k, v, _aligned(bias, q), True, 0.0, causal, scale=scale
    )[:2]
    return y, lse[..., :length]


def _backward(
    name: str,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    y: Tensor,
    lse: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by the kernel's own backward pass."""
    aten, length = torch.ops.aten, q.shape[2]
    if name == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, y, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
        return dq, dk, dv
    if name in ("window", "flash"):
        seed, offset = _unread(q, torch.uint64, 2), _unread(q, torch.uint64, 0)
        grad, q, k, v, y = (x.transpose(1, 2) for x in (grad, q, k, v, y))
        sides = {}
        if name == "window":
            sides = {"window_size_left": window - 1, "window_size_right": 0 if causal else window - 1}
        made = aten._flash_attention_backward(
            grad, q, k, v, y, lse, None, None, length, length, 0.0, causal, seed, offset, scale=scale, **sides
        )
        dq, dk, dv = (x.transpose(1, 2) for x in made)
        return dq, dk, dv
    seed = offset = _unread(q, torch.int64, 1)
    if name == "cudnn":
        stats = lse[..., None] if _cudnn_dims[0] == 4 else lse
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, y, stats, seed, offset, None, None, None, length, length, 0.0, causal, scale=scale
        )
        return dq, dk, dv
    lse = F.pad(lse, (0, -length % PADDED), value=torch.inf)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, _aligned(bias, q), y, lse, seed, offset, 0.0, [True, True, True, False], causal,
        scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def _aligned(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """`bias` for every head of every sequence, its rows at multiples of 16 numbers for the kernel."""
    if bias is None:
        return None
    length = bias.shape[-1]
    wide = F.pad(bias, (0, -length % 16))[..., :length]
    return wide.expand(q.shape[0], q.shape[1], -1, -1)


def _readable(x: Tensor) -> Tensor:
    """`x (B, H, T, D)` as kernels read it: itself where rows are whole, on a GPU aligned and not repeated."""
    if not x.is_cuda:
        return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
    sizes_and_strides = list(zip(x.shape, x.stride(), strict=True))[:-1]
    apart = all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in sizes_and_strides)
    whole = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    return x if whole and apart else x.clone(memory_format=torch.contiguous_format)


def _unread(q: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=q.device)


def _precise(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _laid_out(y: Tensor) -> Tensor:
    room = room_by_token(y)
    return y if y.stride() == room.stride() else room.copy_(y)


def _like(made: Tensor, of: Tensor) -> Tensor:
    """`made` in the layout that `torch.empty_like(of)` has, which compiled code was told."""
    room = torch.empty_like(of)
    return made if made.stride() == room.stride() else room.copy_(made)
