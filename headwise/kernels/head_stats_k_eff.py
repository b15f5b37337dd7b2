"""`k_eff` exactly: the fewest keys that hold `mass` of a query's weight, without sorting a row.

With x the score in base 2 below the row's maximum and e = 2^x, let M(t) be the sum of e over keys
with x >= t. The answer is decided at the threshold where M first reaches `mass · Σ e`. A bracket
lo <= t < hi with M(lo) >= target > M(hi) closes in on it, each step one more walk over the keys:

    tally    M and the number of keys above five thresholds at once. The first five come from
             the mean and variance of x under the weights (left by `stats_kernel`), the largest
             weight taken apart, and from how far n keys stray from them; they often leave about
             one percent of the keys in the bracket.
    collect  the scores inside the bracket, or inside a part of it that should hold the answer, are
             written to a small pool (at most POOL keys a row) while M at its ends is summed anew.
             A search in the pool then ends at the very key.

Most heads need one of each. What a row's bracket proves never depends on a guess: a guess that
misses costs one more walk. Keys of equal weight, which no threshold separates, are counted by
dividing what is missing by their weight. Programs are as many as the GPU holds and take blocks of
queries in turn, so the pool does not grow with T.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headwise.kernels.head_stats_tiles import HIDDEN, LOG2E, key_ranges, tile

# Keys a row can hold in the pool.
POOL = 128
NEVER = tl.constexpr(1e15)
# Shares of weight by which a bracket may be off: rounding of the weights, and of the last division.
SLACK = tl.constexpr(3e-7)
CLOSE = tl.constexpr(2e-7)
# Relative width below which scores count as equal: a few units in the last place.
EQUAL = tl.constexpr(2.5e-6)


@triton.jit
def quantile(u):
    """Quantile of the standard normal distribution, to about 1%: a guess is all that is needed."""
    return 4.91 * (tl.exp2(0.14 * tl.log2(u)) - tl.exp2(0.14 * tl.log2(1.0 - u)))


@triton.jit
def guess(mean, std, share, lo, hi):
    """Threshold above which a share of the weight lies if scores are normal under the weights."""
    u = tl.minimum(tl.maximum(1.0 - share, 1e-6), 1.0 - 1e-6)
    return tl.minimum(tl.maximum(mean + std * quantile(u), lo), hi)


@triton.jit
def tally(x, e, t, count, weight):
    """Add the number and the weight of a tile's keys with x >= t."""
    above = tl.where(x >= t[:, None, None], 1.0, 0.0)
    return count + tl.sum(above, 2), weight + tl.sum(above * e, 2)


@triton.jit
def tighten(t, count, weight, target, lo, hi, n_lo, n_hi, w_lo, w_hi):
    """Move an end of the bracket to threshold t, if t lies within."""
    up = (weight >= target) & (t > lo)
    lo = tl.where(up, t, lo)
    n_lo = tl.where(up, count, n_lo)
    w_lo = tl.where(up, weight, w_lo)
    down = (weight < target) & (t < hi)
    hi = tl.where(down, t, hi)
    n_hi = tl.where(down, count, n_hi)
    w_hi = tl.where(down, weight, w_hi)
    return lo, hi, n_lo, n_hi, w_lo, w_hi


@triton.jit
def settled(lo, hi, n_lo, n_hi, w_lo, w_hi, total):
    """One key left, or keys whose order no longer matters."""
    width = hi - lo
    close = (w_lo - w_hi) * width <= CLOSE * total
    equal = width <= EQUAL * tl.maximum(1.0, -lo)
    return (n_lo - n_hi <= 1.0) | close | equal


@triton.jit
def answer(n_lo, n_hi, w_lo, w_hi, target):
    """Keys above the bracket, and as many of those in it as make up the target."""
    each = (w_lo - w_hi) / tl.maximum(n_lo - n_hi, 1.0)
    wanted = tl.ceil((target - w_hi) / tl.maximum(each, 1e-30))
    return n_hi + tl.minimum(tl.maximum(wanted, 1.0), tl.maximum(n_lo - n_hi, 1.0))


@triton.jit
def between(lo, hi, w_lo, w_hi, target):
    """Where the target should be if scores were spread evenly over the bracket."""
    e_lo = tl.exp2(lo)
    e_hi = tl.exp2(hi)
    share = (target - w_hi) / tl.maximum(w_lo - w_hi, 1e-30)
    t = tl.log2(tl.maximum(e_hi - share * (e_hi - e_lo), e_lo))
    edge = 0.02 * (hi - lo)
    return tl.minimum(tl.maximum(t, lo + edge), hi - edge)


@triton.jit
def put(x, first, last, rows, counts, pool, POOL: tl.constexpr, PTX: tl.constexpr):
    """Append the scores in [first, last) to their rows of the pool; `counts` may exceed POOL.

    In PTX the scores are written from the registers that hold them: `tl.store` would first carry
    every tile through shared memory. All counters are asked before the first answer is waited for.
    """
    if PTX:
        slot = tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            setp.ge.f32 p, $1, $2;
            setp.lt.and.f32 p, $1, $3, p;
            mov.b32 $0, -1;
            @p atom.relaxed.gpu.global.add.u32 $0, [$4], 1;
            }
            """,
            "=r,f,f,f,l",
            [x, first, last, (counts + rows).to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.inline_asm_elementwise(
            f"""
            {{
            .reg .pred p;
            .reg .b64 at;
            setp.lt.u32 p, $1, {POOL};
            mad.wide.u32 at, $1, 4, $2;
            @p st.global.f32 [at], $3;
            mov.b32 $0, 0;
            }}
            """,
            "=r,r,l,f",
            [slot, (pool + rows * POOL).to(tl.int64), x],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        found = (x >= first) & (x < last)
        row = rows + tl.zeros_like(x).to(tl.int32)
        slot = tl.atomic_add(counts + row, 1, mask=found, sem="relaxed")
        tl.store(pool + row * POOL + slot, x, mask=found & (slot < POOL))


@triton.jit
def collect(
    x, first, last, rows, counts, pool, count, weight, POOL: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Put scores in [first, last) into the pool; add the number and the weight of those above."""
    put(x, first, last, rows, counts, pool, POOL, PTX)
    e = tl.exp2(x)
    above = tl.where(x >= last, 1.0, 0.0)
    count += tl.sum(above, 2)
    weight += tl.sum(above * e, 2)
    return count, weight


@triton.jit
def below_top(y, unit, top, MASKED: tl.constexpr):
    """Scores in base 2 below the row's maximum; hidden keys below any threshold."""
    x = y * unit - top[:, None, None]
    if MASKED:
        x = tl.where(y == HIDDEN, HIDDEN, x)
    return x


@triton.jit
def tally_range(
    start, stop, scores, top, unit, at, sums, MASKED: tl.constexpr, WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Walk over keys start … stop and tally those above five thresholds."""
    t0, t1, t2, t3, t4 = at
    n0, n1, n2, n3, n4, w0, w1, w2, w3, w4 = sums
    for start_n in range(start, stop, WIDTH):
        _, y = tile(
            *scores, start_n, CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D,
            MASKED, BLOCK_M, WIDTH, BLOCK_D,
        )  # fmt: skip
        x = below_top(y, unit, top, MASKED)
        e = tl.exp2(x)
        n0, w0 = tally(x, e, t0, n0, w0)
        n1, w1 = tally(x, e, t1, n1, w1)
        n2, w2 = tally(x, e, t2, n2, w2)
        n3, w3 = tally(x, e, t3, n3, w3)
        n4, w4 = tally(x, e, t4, n4, w4)
    return n0, n1, n2, n3, n4, w0, w1, w2, w3, w4


@triton.jit
def collect_range(
    start, stop, scores, top, unit, first, last, counts, pool, sums,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, POOL: tl.constexpr, PTX: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Walk over keys start … stop and collect those between two thresholds."""
    count, weight = sums
    rows = tl.arange(0, BLOCK_M)[:, None, None]
    for start_n in range(start, stop, WIDTH):
        _, y = tile(
            *scores, start_n, CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D,
            MASKED, BLOCK_M, WIDTH, BLOCK_D,
        )  # fmt: skip
        x = below_top(y, unit, top, MASKED)
        count, weight = collect(
            x, first[:, None, None], last[:, None, None], rows, counts, pool, count, weight,
            POOL, PTX,
        )  # fmt: skip
    return count, weight


@triton.jit
def k_eff_kernel(
    q_ptr, k_ptr, factors_ptr, bias_ptr, key_mask_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_bb, stride_bh, stride_bi, stride_bj, lowest, factor,
    batch, heads, kv_heads, tokens, window, softcap, plane,
    state_ptr, out_ptr, counts_ptr, pool_ptr, blocks, jobs, mass, POOL: tl.constexpr,
    PTX: tl.constexpr, SEVERAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, KEY_MASK: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    DATA_MASK: tl.constexpr = BIAS or KEY_MASK
    local = tl.arange(0, BLOCK_M)
    counts = counts_ptr + tl.program_id(0) * BLOCK_M
    pool = pool_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_M * POOL)
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        sbh = job // blocks
        start_m = (blocks - 1 - job % blocks) * BLOCK_M
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
        n_lo = tl.load(state + 4 * plane, mask=here, other=1.0)
        target = (mass - SLACK) * total
        rest = tl.maximum(total - 1.0, 1e-9)
        mean = mean / rest
        std = tl.sqrt(tl.maximum(std / rest - mean * mean, 0.0))
        share = tl.minimum(tl.maximum((target - 1.0) / rest, 1e-3), 1.0 - 1e-6)
        # Standard deviation of the share of weight above a threshold that fits mean and variance.
        noise = 0.2 * tl.exp2(tl.minimum(0.3466 * std * std, 14.0)) / tl.sqrt(tl.maximum(n_lo, 1.0))
        noise = tl.minimum(noise, 0.01)
        # No key above hi; keys below lo weigh less than 1 - mass all together.
        hi = 1e-6 + 2e-7 * tl.abs(top)
        lo = tl.log2(total * (1.0 - mass) / tl.maximum(n_lo, 1.0)) - 1e-5
        w_lo = total
        w_hi = total * 0.0
        n_hi = total * 0.0
        n_all = n_lo
        k_eff = total * 0.0 + 1.0
        open_rows = target > 1.0
        gate = POOL
        first_time = 1
        most = tl.max(tl.where(open_rows, n_lo, 0.0), 0)
        while most > 0:
            while most > gate:
                if first_time > 0:
                    t0 = guess(mean, std, share + 0.5 * (1.0 - share), lo, hi)
                    t1 = guess(mean, std, share + 2.5 * noise, lo, hi)
                    t2 = guess(mean, std, share + 0.6 * noise, lo, hi)
                    t3 = guess(mean, std, share - 0.6 * noise, lo, hi)
                    t4 = guess(mean, std, share - 2.5 * noise, lo, hi)
                else:
                    t = between(lo, hi, w_lo, w_hi, target)
                    t0 = t + 0.15 * (hi - t)
                    t1 = t - 0.15 * (t - lo)
                    t2 = 0.5 * (lo + hi)
                    # On both sides of the mean weight in the bracket: closes in on equal keys.
                    each = tl.log2(tl.maximum((w_lo - w_hi) / tl.maximum(n_lo - n_hi, 1.0), 1e-30))
                    step = 1e-6 * tl.maximum(1.0, -each)
                    t3 = tl.minimum(tl.maximum(each - step, lo), hi)
                    t4 = tl.minimum(tl.maximum(each + step, lo), hi)
                zero = tl.zeros((BLOCK_M, 4), tl.float32)
                at = (t0, t1, t2, t3, t4)
                sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
                if WINDOW:
                    sums = tally_range(
                        begin, full_lo, scores, top, unit, at, sums, True, EDGE_N,
                        CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
                    )  # fmt: skip
                if not DATA_MASK:
                    sums = tally_range(
                        full_lo, full_hi, scores, top, unit, at, sums, False, BLOCK_N,
                        CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
                    )  # fmt: skip
                sums = tally_range(
                    full_hi, end, scores, top, unit, at, sums, True, EDGE_N,
                    CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
                )  # fmt: skip
                for i in tl.static_range(5):
                    lo, hi, n_lo, n_hi, w_lo, w_hi = tighten(
                        at[i], tl.sum(sums[i], 1), tl.sum(sums[5 + i], 1), target,
                        lo, hi, n_lo, n_hi, w_lo, w_hi,
                    )  # fmt: skip
                now = open_rows & settled(lo, hi, n_lo, n_hi, w_lo, w_hi, total)
                k_eff = tl.where(now, answer(n_lo, n_hi, w_lo, w_hi, target), k_eff)
                open_rows = open_rows & ~now
                most = tl.max(tl.where(open_rows, n_lo - n_hi, 0.0), 0)
                gate = 3 * POOL
                first_time = 0
            if most > 0:
                spare = n_lo - n_hi
                reach = 0.375 * POOL / tl.maximum(spare, 1.0) * (hi - lo)
                t = between(lo, hi, w_lo, w_hi, target)
                wide = spare <= POOL
                first = tl.where(wide, lo, tl.maximum(lo, t - reach))
                last = tl.where(wide, hi, tl.minimum(hi, t + reach))
                first = tl.where(open_rows, first, NEVER)
                last = tl.where(open_rows, last, NEVER)
                tl.store(counts + local, tl.zeros((BLOCK_M,), tl.int32))
                tl.debug_barrier()
                zero = tl.zeros((BLOCK_M, 4), tl.float32)
                passed = (zero, zero)
                if WINDOW:
                    passed = collect_range(
                        begin, full_lo, scores, top, unit, first, last, counts, pool, passed,
                        True, EDGE_N, POOL, PTX,
                        CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
                    )  # fmt: skip
                if not DATA_MASK:
                    passed = collect_range(
                        full_lo, full_hi, scores, top, unit, first, last, counts, pool, passed,
                        False, BLOCK_N, POOL, PTX,
                        CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
                    )  # fmt: skip
                passed = collect_range(
                    full_hi, end, scores, top, unit, first, last, counts, pool, passed,
                    True, EDGE_N, POOL, PTX,
                    CAUSAL, WINDOW, SOFTCAP, BIAS, KEY_MASK, D, BLOCK_M, BLOCK_D,
                )  # fmt: skip
                tl.debug_barrier()
                held = tl.load(counts + local).to(tl.float32)
                n_last = tl.sum(passed[0], 1)
                w_last = tl.sum(passed[1], 1)
                lo, hi, n_lo, n_hi, w_lo, w_hi = tighten(
                    last, n_last, w_last, target, lo, hi, n_lo, n_hi, w_lo, w_hi
                )
                # A pool that overflowed proves nothing about its lower end.
                slots = tl.arange(0, POOL)[None, :]
                x = tl.load(pool + local[:, None] * POOL + slots, mask=slots < held[:, None], other=HIDDEN)
                e = tl.exp2(x)
                complete = held <= POOL
                w_first = w_last + tl.sum(e, 1)
                won = open_rows & complete & (w_first >= target) & (w_last < target)
                lo, hi, n_lo, n_hi, w_lo, w_hi = tighten(
                    tl.where(complete, first, NEVER), n_last + held,
                    tl.where(complete, w_first, 0.0), target, lo, hi, n_lo, n_hi, w_lo, w_hi,
                )  # fmt: skip
                # Bisect in the pool, which holds every key of the bracket of the rows that won.
                n_above = n_last
                w_above = w_last
                todo = won & ~settled(lo, hi, n_lo, n_hi, w_lo, w_hi, total)
                while tl.max(todo.to(tl.int32), 0) > 0:
                    t = 0.5 * (lo + hi)
                    above = (x >= t[:, None]) & (x < last[:, None])
                    n_t = n_above + tl.sum(tl.where(above, 1.0, 0.0), 1)
                    w_t = w_above + tl.sum(tl.where(above, e, 0.0), 1)
                    t = tl.where(todo, t, NEVER)
                    w_t = tl.where(todo, w_t, 0.0)
                    lo, hi, n_lo, n_hi, w_lo, w_hi = tighten(
                        t, n_t, w_t, target, lo, hi, n_lo, n_hi, w_lo, w_hi
                    )
                    todo = todo & ~settled(lo, hi, n_lo, n_hi, w_lo, w_hi, total)
                now = open_rows & settled(lo, hi, n_lo, n_hi, w_lo, w_hi, total)
                k_eff = tl.where(now, answer(n_lo, n_hi, w_lo, w_hi, target), k_eff)
                open_rows = open_rows & ~now
                most = tl.max(tl.where(open_rows, n_lo - n_hi, 0.0), 0)
                gate = POOL
                tl.debug_barrier()
        blank = tl.where((n_all > 0) & (total == total), 0.0, float("nan"))
        tl.store(out_ptr + tl.cast(sbh, tl.int64) * tokens + rows, k_eff + blank, mask=here)
