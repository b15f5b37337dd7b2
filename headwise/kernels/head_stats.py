"""Measures of softmax attention in one pass over q·k tiles; forward only, never a (T, T) tensor.

A program owns BLOCK_M queries of one head and walks over the keys. Each of a row's four streams
(`head_stats_tiles`) is an online softmax of its own. Of the running maximum m, with x = s - m in
base 2 and e = 2^x, it carries
    z = Σ e    a = Σ e·x    b = Σ e·x²    (b only where k_eff is asked for: its first guess)
    d = Σ (s - c)    v = Σ (s - c)²       (c = q · mean key: keeps the variance from cancelling)
    r = Σ e·(key - first query of the block), or Σ e·|key - query| where queries see ahead
from which entropy = ln z - a/z · ln 2, max_weight = 1/z and the rest follow. Tiles that every
query of the block sees in full need no mask and take a loop of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.kernels.head_stats_k_eff import POOL, k_eff_kernel
from headwise.kernels.head_stats_tiles import (
    HIDDEN,
    LOG2E,
    cap,
    columns,
    key_ranges,
    position_count,
    sees,
    tile,
)

LN2 = tl.constexpr(0.6931471805599453)
# Factors below this are as good as 0, and must not undo HIDDEN.
LEAST_FACTOR = 1e-12
MEAN_KEYS = tl.constexpr(32)

FIELDS = (
    "entropy", "max_weight", "query_norm", "logit_mean", "logit_std",
    "sink_weight", "self_weight", "previous_weight", "mean_distance",
)  # fmt: skip


@triton.jit
def absorb(
    s, y, m, z, a, b, d, v, r, n, unit, centre, start_m, start_n,
    CAUSAL: tl.constexpr, MOMENT: tl.constexpr, MASKED: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add a tile to the streams' running sums."""
    top = tl.maximum(m, tl.max(y, 2))
    x = y * unit - (top * unit)[:, :, None]
    e = tl.exp2(x)
    apart = s - centre[:, None, None]
    if MASKED:
        apart = tl.where(y != HIDDEN, apart, 0.0)
        if COUNT:
            n += tl.sum(tl.where(y != HIDDEN, 1.0, 0.0), 2)
    drop = (m - top) * unit
    old = tl.exp2(drop)
    e_x = e * x
    if MOMENT:
        b = old * (b + drop * (2.0 * a + drop * z)) + tl.sum(e_x * x, 2)
    a = old * (a + drop * z) + tl.sum(e_x, 2)
    gained = tl.sum(e, 2)
    z = old * z + gained
    d += tl.sum(apart, 2)
    v += tl.sum(apart * apart, 2)
    lane, place = columns(BLOCK_N)
    start = tl.cast(start_n - start_m, tl.float32)
    if CAUSAL:
        r = old * r + tl.sum(e * place.to(tl.float32), 2) + gained * start
    else:
        ahead = start + (lane - tl.arange(0, BLOCK_M)[:, None, None]).to(tl.float32)
        r = old * r + tl.sum(e * tl.abs(ahead + place.to(tl.float32)), 2)
    return top, z, a, b, d, v, r, n


@triton.jit
def picked(
    raw, rows, cols, bias_head, stride_bi, stride_bj, lowest, keys_real, tokens, window, factor,
    softcap, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, KEY_MASK: tl.constexpr,
):  # fmt: skip
    """Base-2 logits (as `tile` gives them) of one key per query, from raw scores `(M,)`."""
    s = cap(raw, factor, softcap, SOFTCAP)
    keep = sees(rows, cols, tokens, window, CAUSAL, WINDOW) & (cols >= 0) & (rows < tokens)
    if KEY_MASK:
        keep = keep & (tl.load(keys_real + cols, mask=keep, other=0) != 0)
    if BIAS:
        at = rows.to(tl.int64) * stride_bi + cols * stride_bj
        bias = tl.load(bias_head + at, mask=keep, other=0.0).to(tl.float32)
        keep = keep & ~(bias <= lowest)
        if SOFTCAP:
            s = (s + bias) * LOG2E
        else:
            s = (s * factor + bias) * LOG2E
    return s, keep


@triton.jit
def stats_kernel(
    q_ptr, k_ptr, factors_ptr, bias_ptr, key_mask_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_bb, stride_bh, stride_bi, stride_bj, lowest, factor,
    batch, heads, kv_heads, tokens, window, softcap, plane, out_ptr, state_ptr, unscale,
    K_EFF: tl.constexpr, SEVERAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, KEY_MASK: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    DATA_MASK: tl.constexpr = BIAS or KEY_MASK
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # long rows first
    sbh = tl.program_id(1)
    h = sbh % heads
    b_index = (sbh // heads) % batch
    kv = h // (heads // kv_heads)
    if SEVERAL:
        factor = tl.load(factors_ptr + sbh // (heads * batch))
    q_head = q_ptr + b_index.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    k_head = k_ptr + b_index.to(tl.int64) * stride_kb + kv.to(tl.int64) * stride_kh
    bias_head = bias_ptr + b_index.to(tl.int64) * stride_bb + h.to(tl.int64) * stride_bh
    keys_real = key_mask_ptr + b_index.to(tl.int64) * tokens

    rows = start_m + tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    inside = (rows < tokens)[:, None] & (ds < D)[None, :]
    at_q = rows.to(tl.int64)[:, None] * stride_qt + ds[None, :]
    at_k = rows.to(tl.int64)[:, None] * stride_kt + ds[None, :]
    q = tl.load(q_head + at_q, mask=inside, other=0.0)
    unit = factor * LOG2E
    scale = factor  # of logit_mean and logit_std
    if SOFTCAP:
        unit = LOG2E
        scale = 1.0
    if BIAS:
        unit = 1.0

    # Single keys of every row: dot products of their own, outside the loop over tiles.
    q32 = q.to(tl.float32)
    norm = tl.sqrt(tl.sum(q32 * q32, 1)) * (factor * unscale)
    some = tl.arange(0, MEAN_KEYS).to(tl.int64) * tokens // MEAN_KEYS
    keys = tl.load(k_head + some[:, None] * stride_kt + ds[None, :], mask=(ds < D)[None, :], other=0.0)
    keys = keys.to(tl.float32)
    keys = tl.where(tl.abs(keys) < 1e30, keys, 0.0)
    mean_key = tl.sum(keys, 0) / MEAN_KEYS
    centre = cap(tl.sum(q32 * mean_key[None, :], 1), factor, softcap, SOFTCAP)
    key = tl.load(k_head + ds, mask=ds < D, other=0.0).to(tl.float32)
    raw_sink = tl.sum(q32 * key[None, :], 1)
    keys = tl.load(k_head + at_k, mask=inside, other=0.0).to(tl.float32)
    raw_self = tl.sum(q32 * keys, 1)
    keys = tl.load(k_head + at_k - stride_kt, mask=inside & (rows > 0)[:, None], other=0.0)
    raw_previous = tl.sum(q32 * keys.to(tl.float32), 1)

    zero = tl.zeros((BLOCK_M, 4), tl.float32)
    m = zero + HIDDEN
    z = zero
    a = zero
    b = zero
    d = zero
    v = zero
    r = zero
    n = zero
    begin, full_lo, full_hi, end = key_ranges(
        start_m, tokens, window, CAUSAL, WINDOW, DATA_MASK, BLOCK_M, BLOCK_N
    )
    if WINDOW:
        for start_n in range(begin, full_lo, BLOCK_N):
            s, y = tile(
                q, k_head, stride_kt, bias_head, stride_bi, stride_bj, lowest, keys_real,
                start_m, start_n, tokens, window, factor, softcap,
                CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, True, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            m, z, a, b, d, v, r, n = absorb(
                s, y, m, z, a, b, d, v, r, n, unit, centre, start_m, start_n,
                CAUSAL, K_EFF, True, DATA_MASK, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    if not DATA_MASK:
        for start_n in range(full_lo, full_hi, BLOCK_N):
            s, y = tile(
                q, k_head, stride_kt, bias_head, stride_bi, stride_bj, lowest, keys_real,
                start_m, start_n, tokens, window, factor, softcap,
                CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, False, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            m, z, a, b, d, v, r, n = absorb(
                s, y, m, z, a, b, d, v, r, n, unit, centre, start_m, start_n,
                CAUSAL, K_EFF, False, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    for start_n in range(full_hi, end, BLOCK_N):
        s, y = tile(
            q, k_head, stride_kt, bias_head, stride_bi, stride_bj, lowest, keys_real,
            start_m, start_n, tokens, window, factor, softcap,
            CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, True, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        m, z, a, b, d, v, r, n = absorb(
            s, y, m, z, a, b, d, v, r, n, unit, centre, start_m, start_n,
            CAUSAL, K_EFF, True, DATA_MASK, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    # Merge the four streams of a row.
    top = tl.max(m, 1)
    drop = (m - top[:, None]) * unit
    share = tl.exp2(drop)
    b = tl.sum(share * (b + drop * (2.0 * a + drop * z)), 1)
    a = tl.sum(share * (a + drop * z), 1)
    if CAUSAL:
        r = r + z * (tl.arange(0, 4) * 2).to(tl.float32)[None, :]
    r = tl.sum(share * r, 1)
    z = tl.sum(share * z, 1)
    if DATA_MASK:
        n = tl.sum(n, 1)
    else:
        n = position_count(rows, tokens, window, CAUSAL, WINDOW).to(tl.float32)
    d = tl.sum(d, 1) / n
    spread_out = tl.sqrt(tl.maximum(tl.sum(v, 1) / n - d * d, 0.0))
    distance = r / z
    if CAUSAL:
        distance = tl.arange(0, BLOCK_M).to(tl.float32) - distance

    out = out_ptr + sbh.to(tl.int64) * tokens + rows
    here = rows < tokens
    blank = tl.where(n > 0, 0.0, float("nan"))
    tl.store(out, (tl.log2(z) - a / z) * LN2 + blank, mask=here)
    tl.store(out + plane, 1.0 / z + blank, mask=here)
    tl.store(out + 2 * plane, norm, mask=here)
    tl.store(out + 3 * plane, scale * (centre + d) + blank, mask=here)
    tl.store(out + 4 * plane, scale * spread_out + blank, mask=here)
    tl.store(out + 8 * plane, distance + blank, mask=here)
    y, keep = picked(
        raw_sink, rows, rows * 0, bias_head, stride_bi, stride_bj, lowest, keys_real, tokens,
        window, factor, softcap, CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK,
    )  # fmt: skip
    sink = tl.where(keep, tl.exp2(tl.minimum((y - top) * unit, 0.0)), 0.0)
    tl.store(out + 5 * plane, sink / z + blank, mask=here)
    y, keep = picked(
        raw_self, rows, rows, bias_head, stride_bi, stride_bj, lowest, keys_real, tokens,
        window, factor, softcap, CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK,
    )  # fmt: skip
    itself = tl.where(keep, tl.exp2(tl.minimum((y - top) * unit, 0.0)), 0.0)
    tl.store(out + 6 * plane, itself / z + blank, mask=here)
    y, keep = picked(
        raw_previous, rows, rows - 1, bias_head, stride_bi, stride_bj, lowest, keys_real, tokens,
        window, factor, softcap, CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK,
    )  # fmt: skip
    previous = tl.where(keep, tl.exp2(tl.minimum((y - top) * unit, 0.0)), 0.0)
    tl.store(out + 7 * plane, previous / z + blank, mask=here)
    if K_EFF:
        state = state_ptr + sbh.to(tl.int64) * tokens + rows
        tl.store(state, top * unit, mask=here)
        tl.store(state + plane, z, mask=here)
        tl.store(state + 2 * plane, a, mask=here)
        tl.store(state + 3 * plane, b, mask=here)
        tl.store(state + 4 * plane, n, mask=here)


def block_sizes(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile shape and launch options per head width, as measured on an H200."""
    block_d = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:
        shape = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    elif block_d <= 128:
        shape = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2, "maxnreg": 128}
    else:
        shape = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    return {**shape, "BLOCK_D": block_d}


def head_stats(
    q: Tensor,
    k: Tensor,
    scale: float,
    factors: list[float],
    bias: Tensor | None,
    key_mask: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    mass: float,
    k_eff: bool,
    blocks: dict[str, int] | None = None,
    k_eff_blocks: dict[str, int] | None = None,
) -> dict[str, Tensor]:
    """The measures by name, each float32 `(S, B, H, T)`; arguments as the plain definition takes.

    `scale · factor` must not be negative.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k if k.stride(-1) == 1 else k.contiguous()
    batch, heads, tokens, width = q.shape
    shape = (len(factors), batch, heads, tokens)
    plane = len(factors) * batch * heads * tokens
    out = q.new_empty((len(FIELDS) + k_eff, *shape), dtype=torch.float32)
    state = q.new_empty((5, *shape), dtype=torch.float32) if k_eff else out
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if bias is not None:
        strides = tuple(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))
    several = len(factors) > 1
    combined = [max(scale * factor, LEAST_FACTOR) for factor in factors]
    arguments = (
        q, k,
        torch.tensor(combined, dtype=torch.float32, device=q.device) if several else out,
        out if bias is None else bias,
        out if key_mask is None else key_mask.contiguous().view(torch.uint8),
        *q.stride()[:3], *k.stride()[:3], *strides,
        0.0 if bias is None else torch.finfo(bias.dtype).min / 2, combined[0],
        batch, heads, k.shape[1], tokens, window or 0, softcap or 1.0, plane,
    )  # fmt: skip
    options = {
        "SEVERAL": several, "CAUSAL": causal, "WINDOW": window is not None,
        "SOFTCAP": softcap is not None, "BIAS": bias is not None,
        "KEY_MASK": key_mask is not None, "D": width,
    }  # fmt: skip
    blocks = blocks or block_sizes(width, q.dtype)
    grid = (triton.cdiv(tokens, blocks["BLOCK_M"]), len(factors) * batch * heads)
    unscale = 1.0 / max(scale, LEAST_FACTOR)
    stats_kernel[grid](*arguments, out, state, unscale, K_EFF=k_eff, **options, **blocks)
    if k_eff:
        blocks = k_eff_blocks or block_sizes(width, q.dtype)
        row_blocks = triton.cdiv(tokens, blocks["BLOCK_M"])
        jobs = row_blocks * len(factors) * batch * heads
        programs = min(jobs, resident_programs(q.device, blocks["BLOCK_M"]))
        counts = q.new_empty((programs, blocks["BLOCK_M"]), dtype=torch.int32)
        pool = q.new_empty((programs, blocks["BLOCK_M"], POOL), dtype=torch.float32)
        k_eff_kernel[(programs,)](
            *arguments, state, out[-1], counts, pool, row_blocks, jobs, mass, POOL=POOL,
            **options, **blocks,
        )  # fmt: skip
    return dict(zip((*FIELDS, "k_eff"), out, strict=False))


def resident_programs(device: torch.device, block_m: int) -> int:
    """Programs that a GPU works on at once: 256 queries on a multiprocessor."""
    if device.type != "cuda":
        return 2
    return 256 // block_m * torch.cuda.get_device_properties(device).multi_processor_count
