"""Running sums within a tile, as products with a triangle of ones.

A scan moves numbers between lanes again and again; in tiles of attention it took longer than all the rest.
The tensor cores do it in a fraction, exactly: a number is the sum of parts of eight bits, the products of a
part with ones are exact in bfloat16, and sums are kept in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

PART = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)
"""Type of the parts; the interpreter knows no products of bfloat16."""


@triton.jit
def leading(x):
    """The first eight bits of each number of x."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def triangle(SIZE: tl.constexpr, UPPER: tl.constexpr):
    """Ones on and above (or below) the diagonal."""
    at = tl.arange(0, SIZE)
    inside = at[:, None] <= at[None, :] if UPPER else at[:, None] >= at[None, :]
    return tl.where(inside, 1.0, 0.0).to(PART)


@triton.jit
def along_rows(x, BEHIND: tl.constexpr, EXACT: tl.constexpr):
    """Inclusive sums along the rows of x, or from behind; to all bits of x where EXACT, else to 17."""
    ones = triangle(x.shape[1], not BEHIND)
    high = leading(x)
    rest = x - high
    if EXACT:
        middle = leading(rest)
        total = tl.dot(middle.to(PART), ones, tl.dot((rest - middle).to(PART), ones))
    else:
        total = tl.dot(rest.to(PART), ones)
    return tl.dot(high.to(PART), ones, total)


@triton.jit
def down_columns(x, BEHIND: tl.constexpr, EXACT: tl.constexpr):
    """Inclusive sums down the columns of x; options as of `along_rows`."""
    ones = triangle(x.shape[0], BEHIND)
    high = leading(x)
    rest = x - high
    if EXACT:
        middle = leading(rest)
        total = tl.dot(ones, middle.to(PART), tl.dot(ones, (rest - middle).to(PART)))
    else:
        total = tl.dot(ones, rest.to(PART))
    return tl.dot(ones, high.to(PART), total)
