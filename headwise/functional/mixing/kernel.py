"""Mix and gate in one pass, forward and backward.

A program owns BLOCK rows of one batch entry; a row is one head of one token. Sums are in float32. The two
sums over all numbers, the gradients of the mix's two weights, are written a program each and added in a
fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from headwise.functional.layout import packed, room_by_token
from headwise.functional.rows import launch, places


@triton.jit
def mix_kernel(
    own_ptr, other_ptr, by_ptr, by_other_ptr, out_ptr, stride_ab, stride_ah, stride_at, stride_bb, stride_bh,
    stride_bt, stride_ob, stride_oh, stride_ot, tokens, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)[None, :]
    own, at = places(own_ptr, stride_ab, stride_ah, stride_at, tokens, HEADS, BLOCK)
    other, at = places(other_ptr, stride_bb, stride_bh, stride_bt, tokens, HEADS, BLOCK)
    out, at = places(out_ptr, stride_ob, stride_oh, stride_ot, tokens, HEADS, BLOCK)
    inside = (at < tokens)[:, None] & (column < WIDTH)
    a = tl.load(own[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(other[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    found = tl.load(by_ptr).to(tl.float32) * a + tl.load(by_other_ptr).to(tl.float32) * b
    tl.store(out[:, None] + column, found.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def mix_backward_kernel(
    own_ptr, other_ptr, dy_ptr, by_ptr, by_other_ptr, d_own_ptr, d_other_ptr, sums_ptr, stride_ab, stride_ah,
    stride_at, stride_bb, stride_bh, stride_bt, stride_yb, stride_yh, stride_yt, stride_ob, stride_oh,
    stride_ot, tokens, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)[None, :]
    own, at = places(own_ptr, stride_ab, stride_ah, stride_at, tokens, HEADS, BLOCK)
    other, at = places(other_ptr, stride_bb, stride_bh, stride_bt, tokens, HEADS, BLOCK)
    dy, at = places(dy_ptr, stride_yb, stride_yh, stride_yt, tokens, HEADS, BLOCK)
    d_own, at = places(d_own_ptr, stride_ob, stride_oh, stride_ot, tokens, HEADS, BLOCK)
    d_other, at = places(d_other_ptr, stride_ob, stride_oh, stride_ot, tokens, HEADS, BLOCK)
    inside = (at < tokens)[:, None] & (column < WIDTH)
    a = tl.load(own[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(other[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    sums = sums_ptr + 2 * tl.program_id(0).to(tl.int64)
    tl.store(sums, tl.sum(tl.sum(d * a, 1), 0))
    tl.store(sums + 1, tl.sum(tl.sum(d * b, 1), 0))
    a = tl.load(by_ptr).to(tl.float32) * d
    b = tl.load(by_other_ptr).to(tl.float32) * d
    tl.store(d_own[:, None] + column, a.to(d_own_ptr.dtype.element_ty), mask=inside)
    tl.store(d_other[:, None] + column, b.to(d_other_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(
    y_ptr, logits_ptr, out_ptr, stride_yb, stride_yh, stride_yt, stride_gb, stride_gh, stride_gt, stride_ob,
    stride_oh, stride_ot, tokens, HEADS: tl.constexpr, WIDTH: tl.constexpr, PER_HEAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)[None, :]
    y, at = places(y_ptr, stride_yb, stride_yh, stride_yt, tokens, HEADS, BLOCK)
    logits, at = places(logits_ptr, stride_gb, stride_gh, stride_gt, tokens, HEADS, BLOCK)
    out, at = places(out_ptr, stride_ob, stride_oh, stride_ot, tokens, HEADS, BLOCK)
    inside = (at < tokens)[:, None] & (column < WIDTH)
    if PER_HEAD:
        g = tl.load(logits, mask=at < tokens, other=0.0).to(tl.float32)[:, None]
    else:
        g = tl.load(logits[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    found = tl.load(y[:, None] + column, mask=inside, other=0.0).to(tl.float32) * tl.sigmoid(g)
    tl.store(out[:, None] + column, found.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward_kernel(
    y_ptr, logits_ptr, dy_ptr, d_y_ptr, d_logits_ptr, stride_yb, stride_yh, stride_yt, stride_gb, stride_gh,
    stride_gt, stride_ub, stride_uh, stride_ut, stride_ob, stride_oh, stride_ot, stride_db, stride_dh,
    stride_dt, tokens, HEADS: tl.constexpr, WIDTH: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)[None, :]
    y, at = places(y_ptr, stride_yb, stride_yh, stride_yt, tokens, HEADS, BLOCK)
    logits, at = places(logits_ptr, stride_gb, stride_gh, stride_gt, tokens, HEADS, BLOCK)
    dy, at = places(dy_ptr, stride_ub, stride_uh, stride_ut, tokens, HEADS, BLOCK)
    d_y, at = places(d_y_ptr, stride_ob, stride_oh, stride_ot, tokens, HEADS, BLOCK)
    d_logits, at = places(d_logits_ptr, stride_db, stride_dh, stride_dt, tokens, HEADS, BLOCK)
    inside = (at < tokens)[:, None] & (column < WIDTH)
    if PER_HEAD:
        g = tl.sigmoid(tl.load(logits, mask=at < tokens, other=0.0).to(tl.float32))[:, None]
    else:
        g = tl.sigmoid(tl.load(logits[:, None] + column, mask=inside, other=0.0).to(tl.float32))
    value = tl.load(y[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_y[:, None] + column, (d * g).to(d_y_ptr.dtype.element_ty), mask=inside)
    slope = d * value * g * (1 - g)
    if PER_HEAD:
        tl.store(d_logits, tl.sum(slope, 1).to(d_logits_ptr.dtype.element_ty), mask=at < tokens)
    else:
        tl.store(d_logits[:, None] + column, slope.to(d_logits_ptr.dtype.element_ty), mask=inside)


class _Mix(torch.autograd.Function):
    """Its gradient has none of its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, other: Tensor, by: Tensor, by_other: Tensor) -> Tensor:
        own, other = packed(own), packed(other)
        out = room_by_token(own)
        grid, sizes = launch(own)
        mix_kernel[grid](
            own, other, by, by_other, out, *own.stride()[:3], *other.stride()[:3], *out.stride()[:3],
            own.shape[2], **sizes,
        )  # fmt: skip
        ctx.save_for_backward(own, other, by, by_other)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        own, other, by, by_other = ctx.saved_tensors
        dy = packed(dy)
        d_own, d_other = room_by_token(own), room_by_token(other)
        grid, sizes = launch(own)
        sums = torch.empty(grid[0], 2, dtype=torch.float32, device=own.device)
        mix_backward_kernel[grid](
            own, other, dy, by, by_other, d_own, d_other, sums, *own.stride()[:3], *other.stride()[:3],
            *dy.stride()[:3], *d_own.stride()[:3], own.shape[2], **sizes,
        )  # fmt: skip
        total = sums.sum(0)
        return d_own, d_other, total[0].to(by.dtype), total[1].to(by_other.dtype)


class _Gate(torch.autograd.Function):
    """Its gradient has none of its own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, logits: Tensor) -> Tensor:
        y = packed(y)
        logits = logits if logits.shape[-1] == 1 else packed(logits)
        out = room_by_token(y)
        grid, sizes = launch(y)
        gate_kernel[grid](
            y, logits, out, *y.stride()[:3], *logits.stride()[:3], *out.stride()[:3], y.shape[2],
            PER_HEAD=logits.shape[-1] == 1, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(y, logits)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        y, logits = ctx.saved_tensors
        dy = packed(dy)
        d_y, d_logits = room_by_token(y), room_by_token(logits)
        grid, sizes = launch(y)
        gate_backward_kernel[grid](
            y, logits, dy, d_y, d_logits, *y.stride()[:3], *logits.stride()[:3], *dy.stride()[:3],
            *d_y.stride()[:3], *d_logits.stride()[:3], y.shape[2], PER_HEAD=logits.shape[-1] == 1, **sizes,
        )  # fmt: skip
        return d_y, d_logits


def mix(own: Tensor, other: Tensor, by: Tensor, by_other: Tensor) -> Tensor:
    """As `headwise.functional.mixing.mixed`, of what the kernel takes."""
    found: Tensor = _Mix.apply(own, other, by, by_other)
    return found


def gate(y: Tensor, logits: Tensor) -> Tensor:
    """As `headwise.functional.mixing.gated`, of what the kernel takes."""
    found: Tensor = _Gate.apply(y, logits)
    return found
