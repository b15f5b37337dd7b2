"""A dimension as a product of nearly equal factors."""

from __future__ import annotations

import math
from functools import cache

MOST_UNEVEN = 2
"""Largest factor over smallest one: what a power of two needs."""


def even_factors(size: int, n_factors: int) -> tuple[int, ...]:
    """Factors, ascending, of `size` or of the least number above it that has nearly equal ones.

    Nearly equal are factors of which the largest is at most twice the smallest. 768 is 24 · 32. A size
    without such factors is padded, as a prime must be: 769 becomes 770 = 22 · 35, 14 becomes 15 = 3 · 5.

    Args:
        size: at least `2**n_factors`, so that no factor is 1.
        n_factors: at least 1.

    Returns:
        Their product is at least `size`; what is beyond it is padding.

    Raises:
        ValueError: a size that is too small for as many factors.
    """
    if n_factors < 1 or size < 2**n_factors:
        raise ValueError(f"{size} has no {n_factors} factors of at least 2; ask for fewer")
    padded = size
    while True:
        found = exact_factors(padded, n_factors)
        if found and found[-1] <= MOST_UNEVEN * found[0]:
            return found
        padded += 1


@cache
def exact_factors(size: int, n_factors: int) -> tuple[int, ...] | None:
    """The factors of `size`, each at least 2, with the least sum, ascending; None if there are none."""
    if n_factors == 1:
        return (size,) if size >= 2 else None
    best: tuple[int, ...] | None = None
    for first in range(_root(size, n_factors), 1, -1):  # the smallest factor is at most the root
        if size % first:
            continue
        rest = exact_factors(size // first, n_factors - 1)
        if rest and rest[0] >= first and (best is None or first + sum(rest) < sum(best)):
            best = (first, *rest)
        if n_factors == 2 and best:  # the largest first factor leaves the least sum
            break
    return best


def _root(size: int, degree: int) -> int:
    """The largest whole number whose power is at most `size`."""
    root = math.isqrt(size) if degree == 2 else round(size ** (1 / degree))
    while root**degree > size:
        root -= 1
    while (root + 1) ** degree <= size:
        root += 1
    return root
