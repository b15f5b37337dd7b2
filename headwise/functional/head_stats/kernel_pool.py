"""A bracket of scores around an answer, and the pool of keys in which `k_eff` is found.

A bracket holds the scores lo < x <= hi (base 2, below the row's maximum): the weight w_lo above lo
reaches the target, the weight w_hi above hi does not.

Every stream of a row (`head_stats_tiles`) has its own part of the pool: a thread appends to it
without asking another, and reads in the search what it wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Constants stand behind the tensors that they multiply: the interpreter of Triton 3.7 takes none in front.
NEVER = tl.constexpr(1e15)
# Share of weight by which the division at the end may be off.
CLOSE = tl.constexpr(2e-7)
# Relative width below which scores count as equal: a few units in the last place.
EQUAL = tl.constexpr(2.5e-6)
# Relative step from a weight to a threshold just past it: a few units in the last place.
PAST = tl.constexpr(3e-7)


@triton.jit
def settled(lo, hi, w_lo, w_hi, total):
    """Whether the order of the keys in the bracket no longer matters."""
    width = hi - lo
    return ((w_lo - w_hi) * width <= total * CLOSE) | (width <= tl.maximum(1.0, -lo) * EQUAL)


@triton.jit
def share_out(each, w_lo, w_hi, target):
    """How many keys of weight `each`, out of a bracket of such keys, make up the target."""
    held = tl.floor((w_lo - w_hi) / each + 0.5)
    return tl.maximum(tl.minimum(tl.ceil((target - w_hi) / each), held), 1.0)


@triton.jit
def between(lo, hi, w_lo, w_hi, target):
    """Where the target should be if weights were spread evenly over the bracket (all as weights)."""
    return hi - (target - w_hi) / tl.maximum(w_lo - w_hi, 1e-30) * (hi - lo)


@triton.jit
def put(
    x, first, last, slot, above, pool, room,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Append the scores in (first, last] to the pool, as far as it has room, and count the scores
    above. `slot` is where a stream's next score goes; its slots lie 4 · BLOCK_M apart.

    One key of each stream at a time, which the halving leads to without moving a register. In PTX the
    store is from the registers, too: `tl.store` would first carry every tile through shared memory.
    """
    if WIDTH > 1:
        left, right = tl.split(tl.reshape(x, (BLOCK_M, 4, WIDTH // 2, 2)))
        slot, above = put(left, first, last, slot, above, pool, room, WIDTH // 2, BLOCK_M, PTX)
        slot, above = put(right, first, last, slot, above, pool, room, WIDTH // 2, BLOCK_M, PTX)
    else:
        x = tl.reshape(x, (BLOCK_M, 4))
        if PTX:
            slot, above = tl.inline_asm_elementwise(
                f"""
                {{
                .reg .pred over, in, fits;
                .reg .b64 at;
                setp.gt.f32 over, $2, $4;
                setp.gt.and.f32 in, $2, $3, !over;
                setp.lt.and.s32 fits, $5, $8, in;
                mul.wide.u32 at, $5, 4;
                add.s64 at, at, $7;
                @fits st.global.f32 [at], $2;
                mov.b32 $0, $5;
                mov.f32 $1, $6;
                @in add.s32 $0, $0, {4 * BLOCK_M};
                @over add.f32 $1, $1, 0f3F800000;
                }}
                """,
                "=&r,=&f,f,f,f,r,f,l,r",
                [x, first, last, slot, above, pool.to(tl.int64), room],
                dtype=(tl.int32, tl.float32), is_pure=False, pack=1,
            )  # fmt: skip
        else:
            inside = (x > first) & (x <= last)
            tl.store(pool + slot, x, mask=inside & (slot < room))
            slot += tl.where(inside, 4 * BLOCK_M, 0)
            above += tl.where(x > last, 1.0, 0.0)
    return slot, above


@triton.jit
def take(begin, end, pool, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, PTX: tl.constexpr):
    """Weights of the scores in slots begin, … of each stream; 0 from `end` on. PTX as in `put`."""
    step = tl.arange(0, CHUNK)[None, None, :] * (4 * BLOCK_M)
    left = (end - begin)[:, :, None]
    at = (pool + begin)[:, :, None]
    if PTX:
        x = tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .b64 at;
            setp.lt.s32 p, $1, $2;
            mad.wide.s32 at, $1, 4, $3;
            mov.f32 $0, 0fCE6E6B28;
            @p ld.global.f32 $0, [at];
            }
            """,
            "=&f,r,r,l",
            [step, left, at.to(tl.int64)],
            dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        x = tl.load(at + step, mask=step < left, other=-1e9)
    return tl.exp2(x)


@triton.jit
def search(
    pool, begin, end, wanted, lo, hi, w_lo, w_hi, target, total,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """How many of the pool's keys, from the heaviest, lift w_hi to the target; for wanted rows.

    Every step weighs the keys above a threshold and looks at the two keys next to it: one of them is
    the last that is needed, or an end of the bracket, so that every step rules out a key.
    """
    end = tl.where(wanted[:, None], end, begin)
    stride: tl.constexpr = 4 * BLOCK_M * CHUNK
    chunks = tl.cdiv(tl.max(tl.max(end - begin, 1), 0), stride)
    base = w_hi
    lo = tl.exp2(lo)
    hi = tl.exp2(hi)
    bound = hi
    extra = total * 0.0
    todo = wanted
    step = 0
    while tl.max(todo.to(tl.int32), 0) > 0:
        t = between(lo, hi, w_lo, w_hi, target)
        if step % 3 == 2:
            t = 0.5 * (lo + hi)
        t = tl.maximum(tl.minimum(t, hi - hi * (2.0 * PAST)), lo + lo * (0.5 * PAST))
        weight = tl.zeros((BLOCK_M, 4), tl.float32)
        up = weight + NEVER
        down = weight
        for chunk in range(chunks):
            e = take(begin + chunk * stride, end, pool, BLOCK_M, CHUNK, PTX)
            above = e >= t[:, None, None]
            weight += tl.sum(tl.where(above, e, 0.0), 2)
            up = tl.minimum(up, tl.min(tl.where(above, e, NEVER), 2))
            down = tl.maximum(down, tl.max(tl.where(above, 0.0, e), 2))
        weight = base + tl.sum(weight, 1)
        up = tl.min(up, 1)
        down = tl.max(down, 1)
        enough = weight >= target
        lo = tl.where(enough, up, lo)
        w_lo = tl.where(enough, weight, w_lo)
        # By rounding alone may no key be left below t.
        found = tl.where(enough, weight - up < target, (weight + down >= target) | (down <= 0.0))
        hi = tl.where(enough | found, hi, down + down * PAST)
        w_hi = tl.where(enough | found, w_hi, weight)
        equal = settled(tl.log2(lo), tl.log2(hi), w_lo, w_hi, total) & ~found
        bound = tl.where(todo & found, t, tl.where(todo & equal, hi, bound))
        missing = tl.where(enough | (down <= 0.0), 0.0, 1.0)
        shared = share_out(0.5 * (lo + hi), w_lo, w_hi, target)
        extra = tl.where(todo & found, missing, tl.where(todo & equal, shared, extra))
        todo = todo & ~(found | equal)
        step += 1
    count = tl.zeros((BLOCK_M, 4), tl.int32)
    for chunk in range(chunks):
        e = take(begin + chunk * stride, end, pool, BLOCK_M, CHUNK, PTX)
        count += tl.sum(tl.where(e >= bound[:, None, None], 1, 0), 2)
    return tl.sum(count, 1).to(tl.float32) + extra
