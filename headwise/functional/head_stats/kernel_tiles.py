"""What the kernels of `head_stats` share: a tile of scores, and which of it a query sees.

The scores of a tile stay in the registers that the tensor cores leave them in: four lanes share a
row there, each with the columns `8g + 2·lane + {0, 1}`. The row is therefore kept as four
independent *streams*, one a lane, with nothing to exchange between lanes until the streams are
merged after the last tile. A tile is viewed as `(BLOCK_M, 4, BLOCK_N / 4)` for that; reductions
over the last axis are additions within a thread. This holds where BLOCK_M >= 16 · num_warps.

Keys come in three ranges: tiles that every query of the block sees in full need no mask and are
BLOCK_N wide; what lies before them (a window) and after them (the diagonal, the end of the text)
is masked, in tiles of EDGE_N.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# The score of a hidden key: below any score, and its square is still a float32.
HIDDEN = tl.constexpr(-1e12)


@triton.jit
def streams(s, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile `(M, N)` as `(M, 4, N / 4)`: a row's scores by the lane that holds them."""
    s = tl.reshape(s, (BLOCK_M, BLOCK_N // 8, 4, 2))
    return tl.reshape(tl.permute(s, (0, 2, 1, 3)), (BLOCK_M, 4, BLOCK_N // 4))


@triton.jit
def columns(BLOCK_N: tl.constexpr):
    """Column of each place of a tile in streams: a part per lane, a part within the thread."""
    lane = (tl.arange(0, 4) * 2)[None, :, None]
    place = tl.arange(0, BLOCK_N // 4)[None, None, :]
    return lane, place // 2 * 8 + place % 2


@triton.jit
def cap(s, factor, softcap, SOFTCAP: tl.constexpr):
    """Soft-capped logits of raw scores; without a cap raw scores, which `factor` makes logits."""
    if SOFTCAP:
        decay = tl.exp2(tl.abs(s) * (factor * (-2.0 * LOG2E) / softcap))
        s = softcap * (1.0 - decay) / (1.0 + decay) * tl.where(s < 0, -1.0, 1.0)
    return s


@triton.jit
def sees(rows, cols, tokens, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys the queries see by their positions alone (queries past the end see anything)."""
    if CAUSAL:
        keep = cols <= rows
    else:
        keep = cols < tokens
    if WINDOW:
        keep = keep & (cols > rows - window) & (cols < rows + window)
    return keep


@triton.jit
def sees_key(key, query, KEY_MASK: tl.constexpr):
    """Whether a key is real, and in the query's document.

    KEY_MASK is 1 where 0 marks padding alone, and 2 where tokens are `2 · start of the document + real`.
    """
    keep = key != 0
    if KEY_MASK == 2:
        keep = ((key & 1) != 0) & ((key >> 1) == (query >> 1))
    return keep


@triton.jit
def key_ranges(
    start_m, tokens, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DATA_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    """Keys of a block of queries: masked `[begin, full_lo)`, full `[.., full_hi)`, masked `[.., end)`."""
    begin = 0
    full_lo = 0
    end = tokens
    shared = tokens  # keys before this one are seen by all, as far as causality and the end go
    if CAUSAL:
        end = tl.minimum(tokens, start_m + BLOCK_M)
        shared = start_m + 1
    if WINDOW:
        begin = tl.maximum(0, start_m - window + 1) // EDGE_N * EDGE_N
        full_lo = tl.cdiv(tl.maximum(0, start_m + BLOCK_M - window), EDGE_N) * EDGE_N
        if not CAUSAL:
            end = tl.minimum(tokens, start_m + BLOCK_M - 1 + window)
            shared = tl.minimum(tokens, start_m + window)
        full_lo = tl.minimum(full_lo, tl.cdiv(end, EDGE_N) * EDGE_N)
    if DATA_MASK:
        full_lo = begin
        shared = begin
    full_hi = full_lo + tl.maximum(0, shared - full_lo) // BLOCK_N * BLOCK_N
    return begin, full_lo, full_hi, end


@triton.jit
def tile(
    q, k_head, stride_kt, bias_head, stride_bi, stride_bj, lowest, keys_real,
    start_m, tokens, window, factor, softcap, start_n,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile in streams: raw (or capped) scores, and scores with bias in base 2 or HIDDEN.

    Without a bias the second are the first, and still to be multiplied by `unit`.
    """
    ds = tl.arange(0, BLOCK_D)
    ns = tl.arange(0, BLOCK_N)
    k_tile = k_head + tl.cast(start_n, tl.int64) * stride_kt + ns[:, None] * stride_kt + ds[None, :]
    if MASKED:
        k = tl.load(k_tile, mask=(start_n + ns < tokens)[:, None] & (ds < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        k = tl.load(k_tile)
    else:
        k = tl.load(k_tile, mask=(ds < D)[None, :], other=0.0)
    s = streams(tl.dot(q, tl.trans(k), input_precision="ieee"), BLOCK_M, BLOCK_N)
    s = cap(s, factor, softcap, SOFTCAP)
    y = s
    if MASKED:
        rows = start_m + tl.arange(0, BLOCK_M)[:, None, None]
        lane, place = columns(BLOCK_N)
        cols = start_n + lane + place
        keep = sees(rows, cols, tokens, window, CAUSAL, WINDOW)
        if KEY_MASK:
            keep = keep & sees_key(
                tl.load(keys_real + cols, mask=cols < tokens, other=0),
                tl.load(keys_real + rows, mask=rows < tokens, other=0), KEY_MASK,
            )  # fmt: skip
        if BIAS:
            at = rows.to(tl.int64) * stride_bi + cols.to(tl.int64) * stride_bj
            inside = (rows < tokens) & (cols < tokens)
            bias = tl.load(bias_head + at, mask=inside, other=0.0).to(tl.float32)
            keep = keep & ~(bias <= lowest)
            if SOFTCAP:
                y = (s + bias) * LOG2E
            else:
                y = (s * factor + bias) * LOG2E
        y = tl.where(keep, y, HIDDEN)
    return s, y
