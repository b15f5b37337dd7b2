"""Tropical attention forward in one pass over the keys: O(T·D) memory.

There are no tensor cores for maxima, so what counts is instructions: for each (query, key, channel) a sum
and a maximum of the score, and a sum, a maximum, a comparison and a choice for the value and its winner. A
program keeps BLOCK_M queries, their best offers and winners in registers, `(BLOCK_M, D)` each, and takes one
key after the other: a score is a maximum over the lanes that share a query, and its offers are made at once.
Nothing goes through shared memory. An offer that is only as good as an earlier one does not win, so that the
lowest index does.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from headwise.functional.layout import packed, padded
from headwise.functional.tropical.chunked import Best, room

UNROLLED = 4
"""Keys of which the scores are made side by side, since a maximum over lanes takes long."""

QUERIES = 16
"""Of a program. There are enough programs at 4,000 queries of all heads to fill a GPU."""


@triton.jit
def greater(a, b):
    """The maximum, NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def absorb(
    q, best, winner, second, top, top_winner, k_head, v_head, stride_kt, stride_vt, rows, ds, key,
    EDGE: tl.constexpr, KEEP: tl.constexpr, MARGIN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Take one key; at an EDGE some queries do not see it."""
    at = tl.cast(key, tl.int64)
    k = tl.load(k_head + at * stride_kt + ds, mask=ds < D, other=0.0).to(tl.float32)
    v = tl.load(v_head + at * stride_vt + ds, mask=ds < D, other=0.0).to(tl.float32)
    score = tl.reduce(q + k[None, :], 1, greater)
    offer = score[:, None] + v[None, :]
    if EDGE:
        score = tl.where(rows >= key, score, float("-inf"))
        offer = tl.where((rows >= key)[:, None], offer, float("-inf"))
    higher = greater(best, offer)
    highest = greater(top, score)
    if KEEP:
        winner = tl.where(higher != best, key, winner)
        top_winner = tl.where(highest != top, key, top_winner)
    if MARGIN:
        lower = tl.minimum(best, offer, propagate_nan=tl.PropagateNan.ALL)
        second = greater(second, lower)
    return higher, winner, second, highest, top_winner


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, top_ptr, winner_ptr, top_winner_ptr, margin_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    heads, group, tokens,
    CAUSAL: tl.constexpr, KEEP: tl.constexpr, MARGIN: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK_M)
    bh = tl.program_id(0) % (tl.num_programs(0) // blocks)
    start = (blocks - 1 - tl.program_id(0) // (tl.num_programs(0) // blocks)) * BLOCK_M  # long rows first
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    rows = start + tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    inside = (rows < tokens)[:, None] & (ds < D)[None, :]
    q = tl.load(
        q_ptr + b * stride_qb + h * stride_qh + rows.to(tl.int64)[:, None] * stride_qt + ds[None, :],
        mask=inside, other=float("-inf"),
    ).to(tl.float32)  # fmt: skip
    k_head = k_ptr + b * stride_kb + h // group * stride_kh
    v_head = v_ptr + b * stride_vb + h // group * stride_vh
    best = tl.full((BLOCK_M, BLOCK_D), float("-inf"), tl.float32)
    winner = tl.full((BLOCK_M, BLOCK_D), -1, tl.int32)
    second = best
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    top_winner = tl.full((BLOCK_M,), -1, tl.int32)
    if CAUSAL:
        whole = start
        end = tl.minimum(start + BLOCK_M, tokens)
    else:
        whole = tokens // UNROLL * UNROLL
        end = tokens
    for first in range(0, whole, UNROLL):
        for step in tl.static_range(UNROLL):
            best, winner, second, top, top_winner = absorb(
                q, best, winner, second, top, top_winner, k_head, v_head, stride_kt, stride_vt, rows, ds,
                first + step, False, KEEP, MARGIN, D,
            )  # fmt: skip
    for key in range(whole, end):
        best, winner, second, top, top_winner = absorb(
            q, best, winner, second, top, top_winner, k_head, v_head, stride_kt, stride_vt, rows, ds,
            key, CAUSAL, KEEP, MARGIN, D,
        )  # fmt: skip
    of_rows = tl.cast(bh, tl.int64) * tokens + rows
    at = of_rows[:, None] * D + ds[None, :]
    tl.store(y_ptr + at, best, mask=inside)
    tl.store(top_ptr + of_rows, top, mask=rows < tokens)
    if KEEP:
        tl.store(winner_ptr + at, winner, mask=inside)
        tl.store(top_winner_ptr + of_rows, top_winner, mask=rows < tokens)
    if MARGIN:
        # A second of -inf is none: one key is seen, and the margin +inf.
        gap = tl.where((ds < D)[None, :], best - second, float("inf"))
        tl.store(margin_ptr + of_rows, tl.reduce(gap, 1, lesser), mask=rows < tokens)


@triton.jit
def lesser(a, b):
    """The minimum, NaN where either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


def blocks_for(width: int) -> dict[str, Any]:
    """Eight numbers of each tile a thread; with more channels than threads keys go through shared memory."""
    wide = padded(width)
    return {"BLOCK_M": QUERIES, "BLOCK_D": wide, "num_warps": wide // 16, "num_stages": 1}


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: bool, margin: bool) -> Best:
    """As `headwise.functional.tropical.chunked.forward`, without a bias and with S = T."""
    found = room(q, keep, margin)
    q, k, v = packed(q), packed(k), packed(v)
    batch, heads, tokens, width = q.shape
    forward_kernel[(triton.cdiv(tokens, QUERIES) * batch * heads,)](
        q, k, v, *found, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        heads, heads // k.shape[1], tokens,
        CAUSAL=causal, KEEP=keep, MARGIN=margin, D=width, UNROLL=UNROLLED, **blocks_for(width),
    )  # fmt: skip
    return found
