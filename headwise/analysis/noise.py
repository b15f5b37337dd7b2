"""The noise floor: the spread of an unchanged baseline over seeds, and the differences that exceed it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headwise.analysis.seeds import Value, count
from headwise.analysis.sequential import detectable
from headwise.analysis.statistics import Summary, spread_interval, summarize

PAIRS = (3, 4, 5, 8, 16, 32)
POWER = 0.8


@dataclass(frozen=True)
class Detectable:
    """The difference that `n` pairs of seeds distinguish from 0 with probability 0.8, at the observed spread
    and at both ends of its interval."""

    n: int
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class NoiseFloor:
    """The spread over seeds of an unchanged baseline.

    Attributes:
        summary: n, mean, std, half-width of the mean's 95% interval (for this n, not valid at every look).
        std_low, std_high: the 95% chi-square interval of the standard deviation; None below 2 seeds.
        detectable: for several numbers of pairs; empty below 2 seeds.
        text: one sentence.
        notes: the omitted runs with the reasons, a clause each.
    """

    summary: Summary
    std_low: float | None
    std_high: float | None
    detectable: tuple[Detectable, ...]
    text: str
    notes: tuple[str, ...]


def noise_floor(
    values: Sequence[Value], name: str = "the baseline", *, comparisons: int = 1, pairs: Sequence[int] = PAIRS
) -> NoiseFloor:
    """The noise floor of the runs of one unchanged baseline.

    The difference of two independent runs has √2 times the spread of one run. Pairs whose values are
    positively correlated over seeds detect smaller differences than stated here.

    Args:
        comparisons: the number of claims for which the detectable differences are corrected.
        pairs: numbers of pairs of seeds; those too small for an interval are left out.
    """
    counted = count(values, name)
    summary = summarize(counted.values.values())
    if counted.doubt is not None:
        return NoiseFloor(summary, None, None, (), f"no noise floor: {counted.doubt}", counted.notes)
    if not summary.std:
        seen = {0: "no seed has a value", 1: "one seed shows no spread"}.get(
            summary.n, "the seeds show no spread"
        )
        return NoiseFloor(
            summary, None, None, (), f"no noise floor: {seen}; run 3 seeds or more", counted.notes
        )
    low, high = spread_interval(summary.std, summary.n)
    found = []
    for n in pairs:
        least = detectable(math.sqrt(2), n, 1 - 0.05 / comparisons, POWER)
        if least is not None:
            found.append(Detectable(n, least * summary.std, least * low, least * high))
    text = (
        f"{summary.n} seeds of {name}: mean {summary.mean:.4g}, standard deviation {summary.std:.2g} "
        f"(95% interval {low:.2g} to {high:.2g})"
    )
    if found:
        one = found[0]
        text += (
            f"; {one.n} pairs of seeds detect a difference of {one.difference:.2g} ({one.low:.2g} to "
            f"{one.high:.2g}) in four of five cases"
        )
        for more in found[-1:] if len(found) > 1 else ():
            text += f", {more.n} pairs one of {more.difference:.2g} ({more.low:.2g} to {more.high:.2g})"
    return NoiseFloor(summary, low, high, tuple(found), text, counted.notes)
