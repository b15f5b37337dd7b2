"""Measures of softmax attention in one pass over q·k tiles; forward only, never a (T, T) tensor.

A program owns BLOCK_M queries of one head and walks over the keys. Each of a row's four streams
(`head_stats_tiles`) is an online softmax of its own. Of the running maximum m, with x = s - m in
base 2 and e = 2^x over the n visible keys so far, it carries
    z = Σ e    a = Σ e·x    b = Σ e·x²    (b only where k_eff is asked for: its first guess)
    d = Σ x    v = Σ x²    u = Σ 2^x      (of scores without the bias: from a maximum g of their own;
                                          where there is no bias g is m, and u is z)
    r = Σ e·(key - first query of the block), or Σ e·|key - query| where queries see ahead
and moves them along when m grows. From these entropy = ln z - a/z · ln 2, max_weight = 1/z and the
rest follow, and g + log2 u is the logits' log-sum-exp. Measured from the maximum, the variance
v/n - (d/n)² of n keys loses at most a factor n of the precision, and of a single key it is exactly 0.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.functional.head_stats.kernel_k_eff import k_eff_kernel
from headwise.functional.head_stats.kernel_tiles import (
    HIDDEN,
    LOG2E,
    cap,
    columns,
    key_ranges,
    sees,
    sees_key,
    tile,
)
from headwise.functional.head_stats.reference import first_real_keys
from headwise.functional.layout import packed

LN2 = tl.constexpr(0.6931471805599453)

# Bytes of keys that programs work on at a time, so that they come from the cache.
CACHED = 2**26

FIELDS = (
    "entropy", "max_weight", "query_norm", "logit_mean", "logit_std",
    "sink_weight", "self_weight", "previous_weight", "mean_distance", "logit_max", "log_sum_exp",
    "log_total",
)  # fmt: skip


@triton.jit
def moved(drop, zeroth, first, second):
    """Sums of x⁰, x, x² (weighted or not) after `drop` was added to every x."""
    return first + drop * zeroth, second + drop * (2.0 * first + drop * zeroth)


@triton.jit
def absorb(
    s, y, m, g, u, z, a, b, n, d, v, r, own, previous, unit, raw_unit, start_m, start_n,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, MOMENT: tl.constexpr, MASKED: tl.constexpr,
    PICK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add a tile to the streams' running sums, and pick the scores of keys i and i - 1 from it."""
    seen = y != HIDDEN
    top = tl.maximum(m, tl.max(y, 2))
    x = y * unit - (top * unit)[:, :, None]
    drop = (m - top) * unit
    e = tl.exp2(x)
    if MASKED:
        e = tl.where(seen, e, 0.0)
        x = tl.where(seen, x, 0.0)
    apart = x
    raw_drop = drop
    if BIAS:
        raw_top = tl.maximum(g, tl.max(tl.where(seen, s, HIDDEN), 2))
        apart = tl.where(seen, (s - raw_top[:, :, None]) * raw_unit, 0.0)
        raw_drop = (g - raw_top) * raw_unit
        g = raw_top
        u = u * tl.exp2(raw_drop) + tl.sum(tl.where(seen, tl.exp2(apart), 0.0), 2)
    d, v = moved(raw_drop, n, d, v)
    d += tl.sum(apart, 2)
    v += tl.sum(apart * apart, 2)
    if MASKED:
        n += tl.sum(tl.where(seen, 1.0, 0.0), 2)
    else:
        n += BLOCK_N // 4
    old = tl.exp2(drop)
    a, b = moved(drop, z, a, b)
    e_x = e * x
    a = old * a + tl.sum(e_x, 2)
    if MOMENT:
        b = old * b + tl.sum(e_x * x, 2)
    gained = tl.sum(e, 2)
    z = old * z + gained
    lane, place = columns(BLOCK_N)
    start = tl.cast(start_n - start_m, tl.float32)
    local = tl.arange(0, BLOCK_M)[:, None, None]
    if CAUSAL:
        r = old * r + tl.sum(e * place.to(tl.float32), 2) + gained * start
    else:
        ahead = start + (lane - local).to(tl.float32)
        r = old * r + tl.sum(e * tl.abs(ahead + place.to(tl.float32)), 2)
    if PICK:
        diagonal = place + (lane + (start_n - start_m) - local)
        own += tl.sum(tl.where(diagonal == 0, y, 0.0), 2)
        previous += tl.sum(tl.where(diagonal == -1, y, 0.0), 2)
    return top, g, u, z, a, b, n, d, v, r, own, previous


@triton.jit
def single(
    raw, rows, cols, bias_head, stride_bi, stride_bj, lowest, keys_real, tokens, window, factor,
    softcap, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr,
):  # fmt: skip
    """What `tile` gives for one key per query, from raw scores `(M,)`."""
    y = cap(raw, factor, softcap, SOFTCAP)
    inside = (cols >= 0) & (cols < tokens) & (rows < tokens)
    keep = inside & sees(rows, cols, tokens, window, CAUSAL, WINDOW)
    if KEY_MASK:
        of_keys = tl.load(keys_real + cols, mask=inside, other=0)
        keep = keep & sees_key(of_keys, tl.load(keys_real + rows, mask=inside, other=0), KEY_MASK)
    if BIAS:
        at = rows.to(tl.int64) * stride_bi + cols.to(tl.int64) * stride_bj
        bias = tl.load(bias_head + at, mask=inside, other=0.0).to(tl.float32)
        keep = keep & ~(bias <= lowest)
        if SOFTCAP:
            y = (y + bias) * LOG2E
        else:
            y = (y * factor + bias) * LOG2E
    return tl.where(keep, y, HIDDEN)


@triton.jit
def weight_of(y, top, z, unit):
    """Weight of a key by its score; another order of summing must not lift it above the maximum."""
    weight = tl.exp2(tl.minimum((y - top) * unit, 0.0)) / z
    return tl.where(y == HIDDEN, 0.0, weight)


@triton.jit
def stats_kernel(
    q_ptr, k_ptr, factors_ptr, bias_ptr, key_mask_ptr, first_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_bb, stride_bh, stride_bi, stride_bj, lowest, factor,
    batch, heads, kv_heads, tokens, window, softcap, plane, out_ptr, state_ptr, ticket_ptr, unscale,
    K_EFF: tl.constexpr, SEVERAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, KEY_MASK: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    DATA_MASK: tl.constexpr = BIAS or (KEY_MASK > 0)
    plane = tl.cast(plane, tl.int64)
    row_blocks = tl.cdiv(tokens, BLOCK_M)
    sbh = tl.program_id(0) // row_blocks
    start_m = (row_blocks - 1 - tl.program_id(0) % row_blocks) * BLOCK_M  # long rows first
    h = sbh % heads
    b_index = ((sbh // heads) % batch).to(tl.int64)
    kv = h // (heads // kv_heads)
    if SEVERAL:
        factor = tl.load(factors_ptr + sbh // (heads * batch))
    q_head = q_ptr + b_index * stride_qb + h.to(tl.int64) * stride_qh
    k_head = k_ptr + b_index * stride_kb + kv.to(tl.int64) * stride_kh
    bias_head = bias_ptr + b_index * stride_bb + h.to(tl.int64) * stride_bh
    keys_real = key_mask_ptr + b_index * tokens

    rows = start_m + tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    at_q = rows.to(tl.int64)[:, None] * stride_qt + ds[None, :]
    q = tl.load(q_head + at_q, mask=(rows < tokens)[:, None] & (ds < D)[None, :], other=0.0)
    unit = factor * LOG2E  # from scores to base 2
    if SOFTCAP:
        unit = LOG2E
    raw_unit = unit
    if BIAS:
        unit = 1.0
    q32 = q.to(tl.float32)
    norm = tl.sqrt(tl.sum(q32 * q32, 1)) * (factor * unscale)
    # The first key of each query's document, or of the row for all queries (16 times, the least a dot
    # takes), and the key before the block, which no tile of the diagonal holds, for the first.
    first = rows * 0
    if KEY_MASK:
        first = tl.load(first_ptr + b_index * tokens + rows, mask=rows < tokens, other=0)
    if KEY_MASK == 2:
        at_first = first.to(tl.int64)[:, None] * stride_kt + ds[None, :]
        key = tl.load(k_head + at_first, mask=(ds < D)[None, :], other=0.0)
        raw_sink = tl.sum(q32 * key.to(tl.float32), 1)
    else:
        at_first = tl.zeros((16,), tl.int64)
        if KEY_MASK:
            at_first += tl.load(first_ptr + b_index * tokens).to(tl.int64) * stride_kt
        key = tl.load(k_head + at_first[:, None] + ds[None, :], mask=(ds < D)[None, :], other=0.0)
        raw_sink = tl.sum(tl.dot(q, tl.trans(key), input_precision="ieee"), 1) * 0.0625
    one_q = tl.load(q_head + start_m.to(tl.int64) * stride_qt + ds, mask=ds < D, other=0.0)
    before = tl.maximum(start_m - 1, 0).to(tl.int64)
    one_k = tl.load(k_head + before * stride_kt + ds, mask=ds < D, other=0.0)
    raw_before = tl.sum(one_q.to(tl.float32) * one_k.to(tl.float32), 0)

    zero = tl.zeros((BLOCK_M, 4), tl.float32)
    m = zero + HIDDEN
    g = m
    u = zero
    z = zero
    a = zero
    b = zero
    n = zero
    d = zero
    v = zero
    r = zero
    own = zero
    previous = zero
    begin, full_lo, full_hi, end = key_ranges(
        start_m, tokens, window, CAUSAL, WINDOW, DATA_MASK, BLOCK_M, BLOCK_N, EDGE_N
    )
    if WINDOW:
        for start_n in range(begin, full_lo, EDGE_N):
            s, y = tile(
                q, k_head, stride_kt, bias_head, stride_bi, stride_bj, lowest, keys_real,
                start_m, tokens, window, factor, softcap, start_n,
                CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, True, BLOCK_M, EDGE_N, BLOCK_D,
            )  # fmt: skip
            m, g, u, z, a, b, n, d, v, r, own, previous = absorb(
                s, y, m, g, u, z, a, b, n, d, v, r, own, previous, unit, raw_unit, start_m, start_n,
                CAUSAL, BIAS, K_EFF, True, True, BLOCK_M, EDGE_N,
            )  # fmt: skip
    if not DATA_MASK:
        for start_n in range(full_lo, full_hi, BLOCK_N):
            s, y = tile(
                q, k_head, stride_kt, bias_head, stride_bi, stride_bj, lowest, keys_real,
                start_m, tokens, window, factor, softcap, start_n,
                CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, False, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            m, g, u, z, a, b, n, d, v, r, own, previous = absorb(
                s, y, m, g, u, z, a, b, n, d, v, r, own, previous, unit, raw_unit, start_m, start_n,
                CAUSAL, BIAS, K_EFF, False, not CAUSAL, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    for start_n in range(full_hi, end, EDGE_N):
        s, y = tile(
            q, k_head, stride_kt, bias_head, stride_bi, stride_bj, lowest, keys_real,
            start_m, tokens, window, factor, softcap, start_n,
            CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, True, BLOCK_M, EDGE_N, BLOCK_D,
        )  # fmt: skip
        m, g, u, z, a, b, n, d, v, r, own, previous = absorb(
            s, y, m, g, u, z, a, b, n, d, v, r, own, previous, unit, raw_unit, start_m, start_n,
            CAUSAL, BIAS, K_EFF, True, True, BLOCK_M, EDGE_N,
        )  # fmt: skip

    # Merge the four streams of a row.
    top = tl.max(m, 1)
    drop = (m - top[:, None]) * unit
    share = tl.exp2(drop)
    raw_top = top
    raw_drop = drop
    if BIAS:
        raw_top = tl.max(g, 1)
        raw_drop = (g - raw_top[:, None]) * raw_unit
    d, v = moved(raw_drop, n, d, v)
    n = tl.sum(n, 1)
    d = tl.sum(d, 1) / n
    v = tl.sum(v, 1) / n - d * d
    a, b = moved(drop, z, a, b)
    a = tl.sum(share * a, 1)
    b = tl.sum(share * b, 1)
    if CAUSAL:
        r = r + z * (tl.arange(0, 4) * 2).to(tl.float32)[None, :]
    z = tl.sum(share * z, 1)
    if BIAS:
        u = tl.sum(tl.exp2(raw_drop) * u, 1)
    else:
        u = z
    distance = tl.sum(share * r, 1) / z
    local = tl.arange(0, BLOCK_M)
    if CAUSAL:
        distance = local.to(tl.float32) - distance
    own = tl.sum(own, 1)
    previous = tl.sum(previous, 1)
    sink = single(
        raw_sink, rows, first, bias_head, stride_bi, stride_bj, lowest, keys_real, tokens,
        window, factor, softcap, CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK,
    )  # fmt: skip
    earlier = single(
        raw_before, rows, rows - 1, bias_head, stride_bi, stride_bj, lowest, keys_real, tokens,
        window, factor, softcap, CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK,
    )  # fmt: skip
    previous = tl.where(local == 0, earlier, previous)

    out = out_ptr + sbh.to(tl.int64) * tokens + rows
    here = rows < tokens
    blank = tl.where(n > 0, 0.0, float("nan"))
    entropy = (tl.log2(z) - a / z) * LN2
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    largest = tl.where(z < 1.0, 1.0, 1.0 / z)
    tl.store(out, entropy + blank, mask=here)
    tl.store(out + plane, largest + blank, mask=here)
    tl.store(out + 2 * plane, norm, mask=here)
    tl.store(out + 3 * plane, (raw_top * raw_unit + d) * LN2 + blank, mask=here)
    tl.store(out + 4 * plane, tl.sqrt(tl.where(v < 0.0, 0.0, v)) * LN2 + blank, mask=here)
    tl.store(out + 5 * plane, weight_of(sink, top, z, unit) + blank, mask=here)
    tl.store(out + 6 * plane, weight_of(own, top, z, unit) + blank, mask=here)
    tl.store(out + 7 * plane, weight_of(previous, top, z, unit) + blank, mask=here)
    tl.store(out + 8 * plane, distance + blank, mask=here)
    highest = tl.where(d == d, raw_top * raw_unit, d)  # a maximum passes over NaN
    tl.store(out + 9 * plane, highest * LN2 + blank, mask=here)
    tl.store(out + 10 * plane, (highest + tl.log2(u)) * LN2 + blank, mask=here)
    # Of a query that sees no key z is 0, and so is the total.
    tl.store(out + 11 * plane, tl.where(n > 0, (top * unit + tl.log2(z)) * LN2, float("-inf")), mask=here)
    if K_EFF:
        state = state_ptr + sbh.to(tl.int64) * tokens + rows
        tl.store(state, top * unit, mask=here)
        tl.store(state + plane, z, mask=here)
        tl.store(state + 2 * plane, a, mask=here)
        tl.store(state + 3 * plane, b, mask=here)
        tl.store(state + 4 * plane, n, mask=here)
        if tl.program_id(0) == 0:
            tl.store(ticket_ptr, 0)


def block_sizes(width: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Tile shapes and launch options of `stats_kernel` and `k_eff_kernel` per head width.

    Two programs of either share a multiprocessor of an H200.
    """
    block_d = max(16, triton.next_power_of_2(width))
    narrow = {"BLOCK_M": 64, "BLOCK_N": 64, "EDGE_N": 64, "num_stages": 3}
    if dtype == torch.float32:
        narrow = {"BLOCK_M": 64, "BLOCK_N": 32, "EDGE_N": 32, "num_stages": 2}
    elif block_d > 128:
        narrow["num_stages"] = 2
    common = {"BLOCK_D": block_d, "num_warps": 4}
    if dtype == torch.float32 or block_d > 128:
        return narrow | common, narrow | common
    wide = {"BLOCK_M": 64, "BLOCK_N": 128, "EDGE_N": 64, "num_stages": 2}
    return wide | common, narrow | common


def head_stats(
    q: Tensor,
    k: Tensor,
    scale: float,
    factors: list[float],
    bias: Tensor | None,
    key_mask: Tensor | None,
    starts: Tensor | None = None,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    mass: float,
    k_eff: bool,
    blocks: tuple[dict[str, int], dict[str, int]] | None = None,
    pool: int | None = None,
) -> dict[str, Tensor]:
    """The measures by name, each float32 `(S, B, H, T)`; arguments as the plain definition takes.

    `scale` must be positive and no factor negative. `blocks` and `pool` are for tests and tuning:
    tile shapes as `block_sizes` gives them, and how many keys a row's pool holds (a multiple of 4).
    """
    q, k = packed(q), packed(k)
    batch, heads, tokens, width = q.shape
    shape = (len(factors), batch, heads, tokens)
    plane = len(factors) * batch * heads * tokens
    out = q.new_empty((len(FIELDS) + k_eff, *shape), dtype=torch.float32)
    state = q.new_empty((5, *shape), dtype=torch.float32) if k_eff else out
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if bias is not None:
        strides = tuple(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))
    sinks = first_real_keys(key_mask, starts)
    sinks = None if sinks is None else sinks.to(torch.int32).contiguous()
    tokens_read = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    if starts is not None:
        tokens_read = (2 * starts + (1 if key_mask is None else key_mask.int())).contiguous()
    several = len(factors) > 1
    combined = [scale * factor for factor in factors]
    arguments = (
        q, k,
        torch.tensor(combined, dtype=torch.float32, device=q.device) if several else out,
        out if bias is None else bias,
        out if tokens_read is None else tokens_read, out if sinks is None else sinks,
        *q.stride()[:3], *k.stride()[:3], *strides,
        0.0 if bias is None else torch.finfo(bias.dtype).min / 2, combined[0],
        batch, heads, k.shape[1], tokens, window or 0, softcap or 1.0, plane,
    )  # fmt: skip
    options = {
        "SEVERAL": several, "CAUSAL": causal, "WINDOW": window is not None,
        "SOFTCAP": softcap is not None, "BIAS": bias is not None,
        "KEY_MASK": 2 if starts is not None else int(key_mask is not None), "D": width,
    }  # fmt: skip
    first, second = blocks or block_sizes(width, q.dtype)
    copies = len(factors) * batch * heads
    grid = (triton.cdiv(tokens, first["BLOCK_M"]) * copies,)
    ticket = q.new_empty(1, dtype=torch.int32)
    stats_kernel[grid](*arguments, out, state, ticket, 1.0 / scale, K_EFF=k_eff, **options, **first)
    if k_eff:
        rows = second["BLOCK_M"]
        row_blocks = triton.cdiv(tokens, rows)
        programs = min(row_blocks * copies, resident_programs(q.device))
        pool = pool or pool_size(tokens)
        pools = q.new_empty((programs, pool, rows), dtype=torch.float32)
        key_bytes = k.element_size() * k.shape[1] * tokens * width
        k_eff_kernel[(programs,)](
            *arguments, state, out[-1], ticket, pools, pool * rows, row_blocks, copies,
            min(copies, max(1, CACHED * heads // key_bytes)), mass,
            PTX=q.is_cuda and torch.version.hip is None, **options, **second,
        )  # fmt: skip
    return dict(zip((*FIELDS, "k_eff"), out, strict=False))


def pool_size(tokens: int) -> int:
    """Keys of a row's pool: what five thresholds leave of a row grows with the root of its length."""
    return 64 * math.ceil(0.75 * math.sqrt(tokens) / 16)


def resident_programs(device: torch.device) -> int:
    """Programs of `k_eff_kernel` that a GPU works on at once."""
    if device.type != "cuda":
        return 2
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
