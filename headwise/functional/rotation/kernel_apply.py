"""Normalise and rotate in one pass over a tensor, forward and backward.

A program owns BLOCK rows of one batch entry; a row is one head of one token, and its two halves are read
apart. Sums are in float32. With r = 1 / rms(x) and n = w · r · x,

    y = R n,    dn = R' dy,    dw = Σ dn · r · x,    dx = r (w · dn - r² x mean(w · dn · x))

r is computed anew in the backward pass, so nothing but x is kept. The sum over rows of dw is the only one
between programs: each writes its own, and they are added in a fixed order.
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
def forward_kernel(
    x_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, stride_xb, stride_xh, stride_xt, stride_ob, stride_oh,
    stride_ot, stride_table, tokens, epsilon, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ROTATE: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pairs = tl.arange(0, BLOCK_D)[None, :]
    first, second = pairs, pairs + (WIDTH + 1) // 2
    x, at = places(x_ptr, stride_xb, stride_xh, stride_xt, tokens, HEADS, BLOCK)
    out, at = places(out_ptr, stride_ob, stride_oh, stride_ot, tokens, HEADS, BLOCK)
    low = (at < tokens)[:, None] & (first < (WIDTH + 1) // 2)
    high = (at < tokens)[:, None] & (second < WIDTH)
    a = tl.load(x[:, None] + first, mask=low, other=0.0).to(tl.float32)
    b = tl.load(x[:, None] + second, mask=high, other=0.0).to(tl.float32)
    if NORM:
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / WIDTH + epsilon)[:, None]
        a = a * r * tl.load(weight_ptr + first, mask=first < (WIDTH + 1) // 2, other=0.0).to(tl.float32)
        b = b * r * tl.load(weight_ptr + second, mask=second < WIDTH, other=0.0).to(tl.float32)
    if ROTATE:
        row = at[:, None].to(tl.int64) * stride_table
        turned = a * tl.load(cos_ptr + row + first, mask=low, other=0.0)
        turned -= b * tl.load(sin_ptr + row + first, mask=low, other=0.0)
        b = b * tl.load(cos_ptr + row + second, mask=high, other=0.0)
        b += a * tl.load(sin_ptr + row + second, mask=high, other=0.0)
        a = turned
    tl.store(out[:, None] + first, a.to(out_ptr.dtype.element_ty), mask=low)
    tl.store(out[:, None] + second, b.to(out_ptr.dtype.element_ty), mask=high)


@triton.jit
def backward_kernel(
    x_ptr, dy_ptr, cos_ptr, sin_ptr, weight_ptr, dx_ptr, sums_ptr, stride_xb, stride_xh, stride_xt,
    stride_yb, stride_yh, stride_yt, stride_ob, stride_oh, stride_ot, stride_table, tokens, epsilon,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pairs = tl.arange(0, BLOCK_D)[None, :]
    first, second = pairs, pairs + (WIDTH + 1) // 2
    dy, at = places(dy_ptr, stride_yb, stride_yh, stride_yt, tokens, HEADS, BLOCK)
    dx, at = places(dx_ptr, stride_ob, stride_oh, stride_ot, tokens, HEADS, BLOCK)
    low = (at < tokens)[:, None] & (first < (WIDTH + 1) // 2)
    high = (at < tokens)[:, None] & (second < WIDTH)
    da = tl.load(dy[:, None] + first, mask=low, other=0.0).to(tl.float32)
    db = tl.load(dy[:, None] + second, mask=high, other=0.0).to(tl.float32)
    if ROTATE:
        row = at[:, None].to(tl.int64) * stride_table
        back = da * tl.load(cos_ptr + row + first, mask=low, other=0.0)
        back += db * tl.load(sin_ptr + row + second, mask=high, other=0.0)
        db = db * tl.load(cos_ptr + row + second, mask=high, other=0.0)
        db -= da * tl.load(sin_ptr + row + first, mask=low, other=0.0)
        da = back
    if NORM:
        x, at = places(x_ptr, stride_xb, stride_xh, stride_xt, tokens, HEADS, BLOCK)
        a = tl.load(x[:, None] + first, mask=low, other=0.0).to(tl.float32)
        b = tl.load(x[:, None] + second, mask=high, other=0.0).to(tl.float32)
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / WIDTH + epsilon)[:, None]
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * WIDTH
        tl.store(sums + pairs, tl.sum(da * a * r, 0)[None, :], mask=first < (WIDTH + 1) // 2)
        tl.store(sums + second, tl.sum(db * b * r, 0)[None, :], mask=second < WIDTH)
        da *= tl.load(weight_ptr + first, mask=first < (WIDTH + 1) // 2, other=0.0).to(tl.float32)
        db *= tl.load(weight_ptr + second, mask=second < WIDTH, other=0.0).to(tl.float32)
        mean = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / WIDTH)[:, None]
        da = r * (da - r * r * a * mean)
        db = r * (db - r * r * b * mean)
    tl.store(dx[:, None] + first, da.to(dx_ptr.dtype.element_ty), mask=low)
    tl.store(dx[:, None] + second, db.to(dx_ptr.dtype.element_ty), mask=high)


def forward(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None, epsilon: float
) -> Tensor:
    """x `(B, H, T, D)` normalised where there is a weight, and rotated where there are tables."""
    x = packed(x)
    cos, sin, weight = (None if part is None else part.contiguous() for part in (cos, sin, weight))
    out = room_by_token(x)
    grid, sizes = launch(x, 2)
    table = x if cos is None else cos
    forward_kernel[grid](
        x, table, x if sin is None else sin, x if weight is None else weight, out, *x.stride()[:3],
        *out.stride()[:3], table.stride(-2), x.shape[2], epsilon, ROTATE=cos is not None,
        NORM=weight is not None, **sizes,
    )  # fmt: skip
    return out


def backward(
    dy: Tensor,
    x: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of the weight; x is needed where there is one."""
    dy = packed(dy)
    x = dy if x is None else packed(x)
    cos, sin, weight = (None if part is None else part.contiguous() for part in (cos, sin, weight))
    dx = room_by_token(dy)
    grid, sizes = launch(dy, 2)
    table = dy if cos is None else cos
    rows = 1 if weight is None else grid[0]
    sums = torch.empty(rows, dy.shape[-1], dtype=torch.float32, device=dy.device)
    backward_kernel[grid](
        x, dy, table, dy if sin is None else sin, dy if weight is None else weight, dx, sums,
        *x.stride()[:3], *dy.stride()[:3], *dx.stride()[:3], table.stride(-2), dy.shape[2], epsilon,
        ROTATE=cos is not None, NORM=weight is not None, **sizes,
    )  # fmt: skip
    return dx, None if weight is None else sums.sum(0).to(weight.dtype)


class _Rotated(torch.autograd.Function):
    """Its gradient has none of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None, epsilon: float
    ) -> Tensor:
        ctx.save_for_backward(x if weight is not None else None, cos, sin, weight)
        ctx.epsilon = epsilon
        return forward(x, cos, sin, weight, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, weight = ctx.saved_tensors
        dx, d_weight = backward(dy, x, cos, sin, weight, ctx.epsilon)
        return dx, None, None, d_weight, None


def apply(x: Tensor, tables: tuple[Tensor, Tensor] | None, weight: Tensor | None, epsilon: float) -> Tensor:
    """As `headwise.functional.rotation.rotated`, of an x that the kernel takes."""
    cos, sin = tables if tables is not None else (None, None)
    found: Tensor = _Rotated.apply(x, cos, sin, weight, epsilon)
    return found
