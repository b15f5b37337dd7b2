"""The number of further seeds that would decide a comparison: a range, since few seeds give a rough spread.

The true standard deviation lies in a chi-square interval: with 2 seeds the 80% interval reaches from 0.6 to 8
times the observed value, with 5 seeds from 0.7 to 1.9 times. The number of seeds needed grows with its
square.
"""

from __future__ import annotations

from collections.abc import Callable

from headwise.analysis.statistics import Summary, spread_interval

MOST_SEEDS = 1_000_000
CONFIDENCE = 0.8

Seeds = tuple[int, int | None]
"""From and to; `None` stands for more than a million, or for no number at all."""


def further_seeds(difference: Summary, decided: Callable[[float, int], bool]) -> Seeds | None:
    """The range of further seeds after which the observed mean difference would be decided.

    Args:
        difference: the observed n, mean and standard deviation.
        decided: whether (standard deviation, number of seeds) would decide the observed mean; more seeds
            never undo a decision.

    Returns:
        Two numbers of at least 1, for both ends of the 80% interval of the spread. None if no spread was
        observed, or if even the lower end needs more than a million seeds.
    """
    if not difference.std:
        return None
    low, high = (
        _first(lambda total, std=std: decided(std, total), difference.n)  # type: ignore[misc]
        for std in spread_interval(difference.std, difference.n, CONFIDENCE)
    )
    return None if low is None else (low - difference.n, None if high is None else high - difference.n)


def in_words(seeds: Seeds) -> str:
    """`between 3 and 40 further seeds`, `3 or more further seeds`."""
    low, high = seeds
    if high is None:
        return f"{low:,} or more further seeds"
    if low == high:
        return f"{low:,} further seed{'' if low == 1 else 's'}"
    return f"between {low:,} and {high:,} further seeds"


def _first(decided: Callable[[int], bool], n: int) -> int | None:
    """The smallest number above `n` that decides; None if it exceeds a million."""
    low, high = n, n + 1
    while not decided(high):
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high
