"""Undo a rotary embedding in one pass over the tensor; see `headwise.watch.rotation` for the formula.

A program owns BLOCK_T tokens of one head and reads the two coordinates of every pair, in the model's
dtype; sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.functional.layout import packed


@triton.jit
def unrotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, stride_xb, stride_xh, stride_xt, stride_tb, stride_tt, stride_tp,
    heads, tokens, start, width, PAIRS: tl.constexpr, FROM_HALVES: tl.constexpr, TO_HALVES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK_T)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    pairs = tl.arange(0, BLOCK_P)
    inside = (rows < tokens)[:, None] & (pairs < PAIRS)[None, :]
    at = (bh // heads) * stride_tb + rows[:, None].to(tl.int64) * stride_tt + pairs[None, :] * stride_tp
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
    x = x_ptr + (bh // heads) * stride_xb + (bh % heads) * stride_xh + rows[:, None].to(tl.int64) * stride_xt
    x += start
    if FROM_HALVES:
        first = pairs
        second = pairs + PAIRS
    else:
        first = 2 * pairs
        second = 2 * pairs + 1
    a = tl.load(x + first[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + second[None, :], mask=inside, other=0.0).to(tl.float32)
    if TO_HALVES:
        first = pairs
        second = pairs + PAIRS
    else:
        first = 2 * pairs
        second = 2 * pairs + 1
    out = out_ptr + (bh * tokens + rows[:, None]) * width + start
    tl.store(out + first[None, :], (a * cos + b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + second[None, :], (b * cos - a * sin).to(out_ptr.dtype.element_ty), mask=inside)


def unrotate(
    x: Tensor, cos: Tensor, sin: Tensor, start: int, *, from_halves: bool, to_halves: bool
) -> Tensor:
    """x `(B, ·, T, D)` before its rotation.

    Args:
        cos, sin: the rotation's divided by cos² + sin², `(B or 1, 1, T, P)` float32.
        start: the first of the 2·P coordinates that were rotated; the others stay.
        from_halves: whether pair p is now (p, p + P), or (2p, 2p + 1).
        to_halves: the same of before.
    """
    x = packed(x)
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, tokens, width = x.shape
    pairs = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if 2 * pairs < width:
        out.copy_(x)
    block_p = triton.next_power_of_2(pairs)
    block_t = max(1, 2048 // block_p)
    unrotate_kernel[(triton.cdiv(tokens, block_t) * batch * heads,)](
        x, cos, sin, out, *x.stride()[:3], 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(2),
        cos.stride(3), heads, tokens, start, width, PAIRS=pairs, FROM_HALVES=from_halves,
        TO_HALVES=to_halves, BLOCK_T=block_t, BLOCK_P=block_p, num_warps=4,
    )  # fmt: skip
    return out
