"""`k_eff` exactly: the fewest keys that hold `mass` of a query's weight, without sorting a row.

With x the score in base 2 below the row's maximum and e = 2^x, let M(t) be the sum of e over keys
with x > t. The answer is decided at the threshold where M first reaches `mass · Σ e`. A bracket
lo < x <= hi with M(lo) >= target > M(hi) closes in on it by walks over the keys:

    tally    M above five thresholds at once. The first five come from the mean and variance of x
             under the weights (left by `stats_kernel`), the largest weight taken apart, and from
             how far n keys stray from them; they often leave about one percent of the keys. Rows
             whose keys the pool holds anyway need no tally.
    collect  the scores inside the bracket are written to a small pool, the keys above counted. A
             search in the pool then ends at the very key.

Most heads need one of each. What a row's bracket proves never depends on a guess: a guess that
misses costs one more walk. Keys of equal weight, which no threshold separates, are counted by
dividing what is missing by their weight.

Programs are as many as the GPU holds and take blocks of queries by ticket, so the pool does not
grow with the number of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headwise.functional.head_stats.kernel_pool import NEVER, between, put, search, settled, share_out
from headwise.functional.head_stats.kernel_tiles import HIDDEN, LOG2E, key_ranges, tile

SLACK = tl.constexpr(3e-7)  # share of weight that rounding may take away


@triton.jit
def quantile(u):
    """Quantile of the standard normal distribution, to about 1%: a guess is all that is needed."""
    return 4.91 * (tl.exp2(0.14 * tl.log2(u)) - tl.exp2(0.14 * tl.log2(1.0 - u)))


@triton.jit
def guess(mean, std, share, lo, hi):
    """Threshold above which a share of the weight lies if scores are normal under the weights."""
    u = tl.minimum(tl.maximum(1.0 - share, 1e-6), 1.0 - 1e-6)
    # A step below, so that equal keys, which stray from their mean by rounding alone, lie above.
    return tl.minimum(tl.maximum(mean + std * quantile(u) - 1e-6, lo), hi)


@triton.jit
def tally(x, e, t, weight, PTX: tl.constexpr):
    """Add the weight of a tile's keys with x > t.

    In PTX the comparison is a saturated multiplication, exact as x and t differ by far more than
    2^-100 or not at all: comparing proper takes the slower of a multiprocessor's pipes.
    """
    if PTX:
        above = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, 0f71800000, $2;",
            "=f,f,f",
            [x, (t * -1.2676506002282294e30)[:, None, None]],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        above = tl.where(x > t[:, None, None], 1.0, 0.0)
    return weight + tl.sum(above * e, 2)


@triton.jit
def tighten(t, weight, target, lo, hi, w_lo, w_hi):
    """Move an end of the bracket to threshold t, if t lies within."""
    up = (weight >= target) & (t > lo)
    down = (weight < target) & (t < hi)
    return (
        tl.where(up, t, lo), tl.where(down, t, hi),
        tl.where(up, weight, w_lo), tl.where(down, weight, w_hi),
    )  # fmt: skip


@triton.jit
def most_keys(lo, w_lo, w_hi, n, wanted):
    """The largest number of keys that a wanted row's bracket can hold."""
    spare = tl.minimum(tl.exp2(-lo) * (w_lo - w_hi), n)
    return tl.max(tl.where(wanted, tl.maximum(spare, 1.0), 0.0), 0)


@triton.jit
def below_top(y, unit, top, MASKED: tl.constexpr):
    """Scores in base 2 below the row's maximum; hidden keys below any threshold."""
    x = y * unit - top[:, None, None]
    if MASKED:
        x = tl.where(y == HIDDEN, HIDDEN, x)
    return x


@triton.jit
def tally_range(
    start, stop, scores, top, unit, at, sums,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Walk over keys start … stop and tally those above five thresholds."""
    t0, t1, t2, t3, t4 = at
    w0, w1, w2, w3, w4 = sums
    for start_n in range(start, stop, WIDTH):
        _, y = tile(
            *scores, start_n, CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D,
            MASKED, BLOCK_M, WIDTH, BLOCK_D,
        )  # fmt: skip
        x = below_top(y, unit, top, MASKED)
        e = tl.exp2(x)
        w0 = tally(x, e, t0, w0, PTX)
        w1 = tally(x, e, t1, w1, PTX)
        w2 = tally(x, e, t2, w2, PTX)
        w3 = tally(x, e, t3, w3, PTX)
        w4 = tally(x, e, t4, w4, PTX)
    return w0, w1, w2, w3, w4


@triton.jit
def collect_range(
    start, stop, scores, top, unit, bounds, pool, room, found,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Walk over keys start … stop, collect those between two thresholds and count those above."""
    first, last = bounds
    slot, above = found
    for start_n in range(start, stop, WIDTH):
        _, y = tile(
            *scores, start_n, CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D,
            MASKED, BLOCK_M, WIDTH, BLOCK_D,
        )  # fmt: skip
        x = below_top(y, unit, top, MASKED)
        slot, above = put(x, first, last, slot, above, pool, room, WIDTH // 4, BLOCK_M, PTX)
    return slot, above


@triton.jit(do_not_specialize=["room", "blocks", "copies", "group", "batch", "heads", "kv_heads"])
def k_eff_kernel(
    q_ptr, k_ptr, factors_ptr, bias_ptr, key_mask_ptr, first_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_bb, stride_bh, stride_bi, stride_bj, lowest, factor,
    batch, heads, kv_heads, tokens, window, softcap, plane,
    state_ptr, out_ptr, ticket_ptr, pool_ptr, room, blocks, copies, group, mass,
    PTX: tl.constexpr, SEVERAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, KEY_MASK: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    DATA_MASK: tl.constexpr = BIAS or (KEY_MASK > 0)
    plane = tl.cast(plane, tl.int64)
    local = tl.arange(0, BLOCK_M)
    pool = pool_ptr + tl.program_id(0).to(tl.int64) * room
    begins = local[:, None] * 4 + tl.arange(0, 4)[None, :]
    # A bracket of that many keys seldom fills one of a row's four parts.
    enough_room = room * (0.6667 / BLOCK_M)
    job = tl.program_id(0)
    while job < blocks * copies:
        # Heads in groups whose keys fit the cache; in a group the longest blocks first.
        group_start = job // (group * blocks) * group
        in_group = tl.minimum(group, copies - group_start)
        place = job - group_start * blocks
        sbh = group_start + place % in_group
        start_m = (blocks - 1 - place // in_group) * BLOCK_M
        job = tl.num_programs(0) + tl.atomic_add(ticket_ptr, 1, sem="relaxed")
        h = sbh % heads
        b_index = (sbh // heads) % batch
        kv = h // (heads // kv_heads)
        if SEVERAL:
            factor = tl.load(factors_ptr + sbh // (heads * batch))
        q_head = q_ptr + tl.cast(b_index, tl.int64) * stride_qb + tl.cast(h, tl.int64) * stride_qh
        k_head = k_ptr + tl.cast(b_index, tl.int64) * stride_kb + tl.cast(kv, tl.int64) * stride_kh
        bias_head = bias_ptr + tl.cast(b_index, tl.int64) * stride_bb + tl.cast(h, tl.int64) * stride_bh
        keys_real = key_mask_ptr + tl.cast(b_index, tl.int64) * tokens
        rows = start_m + local
        ds = tl.arange(0, BLOCK_D)
        at_q = rows.to(tl.int64)[:, None] * stride_qt + ds[None, :]
        q = tl.load(q_head + at_q, mask=(rows < tokens)[:, None] & (ds < D)[None, :], other=0.0)
        unit = factor * LOG2E
        if SOFTCAP:
            unit = LOG2E
        if BIAS:
            unit = 1.0
        begin, full_lo, full_hi, end = key_ranges(
            start_m, tokens, window, CAUSAL, WINDOW, DATA_MASK, BLOCK_M, BLOCK_N, EDGE_N
        )

        scores = (
            q, k_head, stride_kt, bias_head, stride_bi, stride_bj, lowest, keys_real,
            start_m, tokens, window, factor, softcap,
        )  # fmt: skip
        state = state_ptr + tl.cast(sbh, tl.int64) * tokens + rows
        here = rows < tokens
        top = tl.load(state, mask=here, other=0.0)
        total = tl.load(state + plane, mask=here, other=1.0)
        mean = tl.load(state + 2 * plane, mask=here, other=0.0)
        std = tl.load(state + 3 * plane, mask=here, other=0.0)
        n = tl.load(state + 4 * plane, mask=here, other=1.0)
        target = (mass - SLACK) * total
        rest = tl.maximum(total - 1.0, 1e-9)
        mean = mean / rest
        std = tl.sqrt(tl.maximum(std / rest - mean * mean, 0.0))
        share = tl.minimum(tl.maximum((target - 1.0) / rest, 1e-3), 1.0 - 1e-6)
        # Standard deviation of the share of weight above a threshold that fits mean and variance.
        noise = 0.2 * tl.exp2(tl.minimum(0.3466 * std * std, 14.0)) / tl.sqrt(tl.maximum(n, 1.0))
        noise = tl.minimum(noise, 0.01)
        # No key above hi; keys below lo weigh less than 1 - mass all together.
        hi = 1e-6 + 2e-7 * tl.abs(top)
        lo = tl.log2(total * (1.0 - mass) / tl.maximum(n, 1.0)) - 1e-5
        w_lo = total
        w_hi = total * 0.0
        each = lo
        k_eff = total * 0.0 + 1.0
        wanted = target > 1.0
        first_time = 1
        gate = enough_room
        while tl.max(wanted.to(tl.int32), 0) > 0:
            most = most_keys(lo, w_lo, w_hi, n, wanted)
            tries = 0
            while (most > gate) & (tries < 2):
                if first_time > 0:
                    t0 = guess(mean, std, share + 0.5 * (1.0 - share), lo, hi)
                    t1 = guess(mean, std, share + 2.5 * noise, lo, hi)
                    t2 = guess(mean, std, share + 0.6 * noise, lo, hi)
                    t3 = guess(mean, std, share - 0.6 * noise, lo, hi)
                    t4 = guess(mean, std, share - 2.5 * noise, lo, hi)
                else:
                    t = tl.log2(between(tl.exp2(lo), tl.exp2(hi), w_lo, w_hi, target))
                    t0 = t + 0.15 * (hi - t)
                    t1 = t - 0.15 * (t - lo)
                    t2 = 0.5 * (lo + hi)
                    # On both sides of the mean weight in the bracket: closes in on equal keys.
                    gap = 1e-6 * tl.maximum(1.0, -each)
                    t3 = tl.minimum(tl.maximum(each - gap, lo), hi)
                    t4 = tl.minimum(tl.maximum(each + gap, lo), hi)
                zero = tl.zeros((BLOCK_M, 4), tl.float32)
                at = (t0, t1, t2, t3, t4)
                sums = (zero, zero, zero, zero, zero)
                if WINDOW:
                    sums = tally_range(
                        begin, full_lo, scores, top, unit, at, sums, True, EDGE_N, PTX,
                        CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
                    )  # fmt: skip
                if not DATA_MASK:
                    sums = tally_range(
                        full_lo, full_hi, scores, top, unit, at, sums, False, BLOCK_N, PTX,
                        CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
                    )  # fmt: skip
                sums = tally_range(
                    full_hi, end, scores, top, unit, at, sums, True, EDGE_N, PTX,
                    CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
                )  # fmt: skip
                for i in tl.static_range(5):
                    lo, hi, w_lo, w_hi = tighten(at[i], tl.sum(sums[i], 1), target, lo, hi, w_lo, w_hi)
                open_rows = wanted & ~settled(lo, hi, w_lo, w_hi, total)
                most = most_keys(lo, w_lo, w_hi, n, open_rows)
                tries += 1
                gate = enough_room
                first_time = 0
            equal = settled(lo, hi, w_lo, w_hi, total)
            first = tl.where(wanted & ~equal, lo, NEVER)
            last = tl.where(wanted, hi, NEVER)
            found = (begins, tl.zeros((BLOCK_M, 4), tl.float32))
            bounds = (first[:, None], last[:, None])
            if WINDOW:
                found = collect_range(
                    begin, full_lo, scores, top, unit, bounds, pool, room, found, True, EDGE_N, PTX,
                    CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
                )  # fmt: skip
            if not DATA_MASK:
                found = collect_range(
                    full_lo, full_hi, scores, top, unit, bounds, pool, room, found, False, BLOCK_N, PTX,
                    CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
                )  # fmt: skip
            found = collect_range(
                full_hi, end, scores, top, unit, bounds, pool, room, found, True, EDGE_N, PTX,
                CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            tl.debug_barrier()
            ends, above = found
            n_hi = tl.sum(above, 1)
            held = tl.sum(ends - begins, 1) // (4 * BLOCK_M)
            each = tl.log2(tl.maximum(w_lo - w_hi, 1e-30) / tl.maximum(held, 1).to(tl.float32))
            complete = wanted & ~equal & (tl.max(ends - begins, 1) <= room)
            missing = search(
                pool, begins, ends, complete, lo, hi, w_lo, w_hi, target, total,
                BLOCK_M, EDGE_N // 4, PTX,
            )  # fmt: skip
            shared = share_out(tl.exp2(0.5 * (lo + hi)), w_lo, w_hi, target)
            missing = tl.where(equal, shared, missing)
            k_eff = tl.where(complete | (wanted & equal), n_hi + missing, k_eff)
            wanted = wanted & ~(complete | equal)
            gate = 0.0
            tl.debug_barrier()
        blank = tl.where((n > 0) & (total == total), 0.0, float("nan"))
        tl.store(out_ptr + tl.cast(sbh, tl.int64) * tokens + rows, k_eff + blank, mask=here)
