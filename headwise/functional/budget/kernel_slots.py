"""One query a head over the slots of a cache: keys, values and F are read once, by many programs at a time.

A program walks over a part of the slots of one key/value head, for all query heads it serves, and
keeps a running softmax; `slot_attention` merges the parts. Query heads fill the rows of a
matrix product, which the tensor cores need at least 16 of: memory is what takes the time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.functional.layout import packed

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK = 64
PROGRAMS = 2048
"""About how many programs keep a large GPU's memory busy."""


@triton.jit
def part_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, sum_ptr, top_ptr, total_ptr,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_fb, stride_fh, stride_fr,
    heads, slots, part, scale, R: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Unnormalised sum, largest score and sum of weights of one part of the slots."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    rs, ds = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    inside = (rs < R)[:, None] & (ds < D)[None, :]
    q = tl.load(q_ptr + (row * R + rs[:, None]) * D + ds[None, :], mask=inside, other=0.0)
    k_head = k_ptr + b * stride_kb + h * stride_kh
    v_head = v_ptr + b * stride_vb + h * stride_vh
    f_head = f_ptr + b * stride_fb + h * stride_fh
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, slots)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        here = s < last
        held = here[:, None] & (ds < D)[None, :]
        k = tl.load(k_head + s.to(tl.int64)[:, None] * stride_ks + ds[None, :], mask=held, other=0.0)
        v = tl.load(v_head + s.to(tl.int64)[:, None] * stride_vs + ds[None, :], mask=held, other=0.0)
        at = rs.to(tl.int64)[:, None] * stride_fr + s[None, :]
        f = tl.load(f_head + at, mask=(rs < R)[:, None] & here[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E) - f * LOG2E
        scores = tl.where(here[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - highest)
        weights = tl.exp2(scores - highest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = highest
    out = (row * tl.num_programs(1) + tl.program_id(1)) * R + rs
    tl.store(sum_ptr + out[:, None] * D + ds[None, :], sums, mask=inside)
    tl.store(top_ptr + out, top, mask=rs < R)
    tl.store(total_ptr + out, total, mask=rs < R)


@torch.library.custom_op("headwise::slot_attention_parts", mutates_args=())
def slot_attention_parts(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, scale: float, parts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each part of the slots: unnormalised sums `(B, K, P, R, D)`, largest scores in base 2 and sums of
    weights `(B, K, P, R)`."""
    batch, heads, ratio, width = q.shape
    slots = k.shape[2]
    sums = torch.empty(batch, heads, parts, ratio, width, dtype=torch.float32, device=q.device)
    top, total = (torch.empty(batch, heads, parts, ratio, dtype=torch.float32, device=q.device) for _ in "ab")
    size = triton.cdiv(triton.cdiv(slots, parts), BLOCK) * BLOCK
    k, v, f = packed(k), packed(v), packed(f)
    part_kernel[(batch * heads, parts)](
        q.contiguous(), k, v, f, sums, top, total, *k.stride()[:3], *v.stride()[:3], *f.stride()[:3],
        heads, slots, size, scale, R=ratio, D=width, BLOCK_R=max(16, triton.next_power_of_2(ratio)),
        BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK_S=BLOCK, num_warps=4, num_stages=3,
    )  # fmt: skip
    return sums, top, total


@slot_attention_parts.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, f: Tensor, scale: float, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, ratio, width = q.shape
    few = q.new_empty(batch, heads, parts, ratio, dtype=torch.float32)
    return q.new_empty(batch, heads, parts, ratio, width, dtype=torch.float32), few, torch.empty_like(few)


def slot_attention(q: Tensor, k: Tensor, v: Tensor, f: Tensor, scale: float) -> Tensor:
    """Attention of one query a head to all slots, under F.

    Args:
        q: `(B, K, R, D)`.
        k, v: `(B, K, S, D)`.
        f: `(B, K, R, S)` float32, expanded where heads share it; finite.

    Returns:
        `(B, K, R, D)`.
    """
    parts = max(1, min(PROGRAMS // (q.shape[0] * q.shape[1]), triton.cdiv(k.shape[2], 4 * BLOCK)))
    sums, top, total = slot_attention_parts(q, k, v, f, scale, parts)
    weights = torch.exp2(top - top.amax(2, keepdim=True))
    y = (sums * weights[..., None]).sum(2) / (total * weights).sum(2)[..., None]
    return y.to(v.dtype)
