"""What a sink does to the output of an attention kernel, and its own gradient, in one pass each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.functional.layout import packed

ROWS = 64


@triton.jit
def rows_at(ptr, stride, rows, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`(rows, BLOCK_D)` of a matrix `(tokens, D)` in float32, zeros outside."""
    ds = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * stride + ds[None, :]
    inside = (rows < tokens)[:, None] & (ds < D)[None, :]
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def apply_sink_kernel(
    y_ptr, lse_ptr, sink_ptr, out_ptr, total_ptr, stride_yb, stride_yh, stride_yt, stride_ob, stride_oh,
    stride_ot, stride_lb, stride_lh, heads, tokens,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`y · sigmoid(lse - c)`, and the log-sum-exp with the sink."""
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = (tl.program_id(0) // heads).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = rows < tokens
    lse = tl.load(lse_ptr + b * stride_lb + h * stride_lh + rows, mask=here, other=0.0)
    c = tl.load(sink_ptr + h).to(tl.float32)
    top = tl.maximum(lse, c)
    total = top + tl.log(tl.exp(lse - top) + tl.exp(c - top))
    tl.store(total_ptr + (b * heads + h) * tokens + rows, total, mask=here)
    y = rows_at(y_ptr + b * stride_yb + h * stride_yh, stride_yt, rows, tokens, D, BLOCK_D)
    ds = tl.arange(0, BLOCK_D)
    at = b * stride_ob + h * stride_oh + rows.to(tl.int64)[:, None] * stride_ot + ds[None, :]
    kept = y * tl.exp(lse - total)[:, None]
    tl.store(out_ptr + at, kept, mask=here[:, None] & (ds < D)[None, :])


@triton.jit
def sink_gradient_kernel(
    y_ptr, grad_ptr, lse_ptr, sink_ptr, part_ptr, stride_yb, stride_yh, stride_yt, stride_gb, stride_gh,
    stride_gt, heads, tokens, blocks, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of queries' share in the sink's gradient, `-Σ_i exp(c - lse_i) Σ_d y · dy`."""
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = (tl.program_id(0) // heads).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    y = rows_at(y_ptr + b * stride_yb + h * stride_yh, stride_yt, rows, tokens, D, BLOCK_D)
    grad = rows_at(grad_ptr + b * stride_gb + h * stride_gh, stride_gt, rows, tokens, D, BLOCK_D)
    lse = tl.load(lse_ptr + (b * heads + h) * tokens + rows, mask=rows < tokens, other=float("inf"))
    c = tl.load(sink_ptr + h).to(tl.float32)
    part = tl.sum(tl.exp(c - lse) * tl.sum(y * grad, 1), 0)
    tl.store(part_ptr + (b * blocks + tl.program_id(1)) * heads + h, -part)


def apply_sink(y: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of a softmax with one more logit, whose value is 0.

    Args:
        y: `(B, H, T, D)` of attention without the sink.
        lse: `(B, H, T)` float32, natural; rows may lie apart.
        sink: `(H,)`.

    Returns:
        y `(B, H, T, D)`, laid out `(B, T, H, D)`; the log-sum-exp, `(B, H, T)`.
    """
    y = packed(y)
    batch, heads, tokens, width = y.shape
    out = torch.empty_like(y.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = lse if lse.stride(-1) == 1 else lse.contiguous()
    total = torch.empty((batch, heads, tokens), dtype=torch.float32, device=y.device)
    apply_sink_kernel[(batch * heads, triton.cdiv(tokens, ROWS))](
        y, lse, sink.contiguous(), out, total, *y.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
        heads, tokens, D=width, BLOCK_M=ROWS, BLOCK_D=max(16, triton.next_power_of_2(width)),
    )  # fmt: skip
    return out, total


def sink_gradient(y: Tensor, grad: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Gradient of the sink, `(H,)` float32, from what `apply_sink` returned and the gradient of its y."""
    y, grad, lse = packed(y), packed(grad), lse.contiguous()
    batch, heads, tokens, width = y.shape
    blocks = triton.cdiv(tokens, ROWS)
    parts = torch.empty((batch * blocks, heads), dtype=torch.float32, device=y.device)
    sink_gradient_kernel[(batch * heads, blocks)](
        y, grad, lse, sink.contiguous(), parts, *y.stride()[:3], *grad.stride()[:3], heads, tokens, blocks,
        D=width, BLOCK_M=ROWS, BLOCK_D=max(16, triton.next_power_of_2(width)),
    )  # fmt: skip
    return parts.sum(0)
