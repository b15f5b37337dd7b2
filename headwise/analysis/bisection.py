"""Which commit made a loss worse, found by measuring as few runs as the noise allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headwise.analysis.statistics import Summary


@dataclass(frozen=True)
class Found:
    """What a bisection ends with.

    Attributes:
        first_bad: index of the first commit that is worse; None where there is none or several are possible.
        candidates: indices of which one is the first bad commit: one where it was found, several where commits
            between them could not be measured or decided, none where the ends do not differ.
        difference: bad - good over the seeds of both ends, with its interval (valid at every look).
        runs: how many measurements were used.
        skipped: index -> why it was not measured or decided.
        why: one sentence with its numbers.
    """

    first_bad: int | None
    candidates: tuple[int, ...]
    difference: Summary
    runs: int
    skipped: dict[int, str]
    why: str


@dataclass(frozen=True)
class Step:
    """The next step: `measure` is what to run now, in any order or side by side, or `found` is the end.

    Attributes:
        measure: (index, seed) pairs, empty exactly where `found` is given.
        found: the answer.
        low, high: the last index known to be good and the first known to be bad so far (None: ends not compared).
        why: what the runs of `measure` are for, as a sentence for the display.
    """

    measure: tuple[tuple[int, int], ...]
    found: Found | None
    low: int | None
    high: int | None
    why: str


def next_step(
    measured: Mapping[tuple[int, int], float | None],
    commits: int,
    *,
    worse: str = "higher",
    smallest: float = 0.0,
    most_seeds: int = 16,
    unrunnable: Mapping[int, str] | None = None,
) -> Step:
    """A pure function of the measurements so far: what to measure next, or the answer.

    Args:
        measured: (index, seed) -> value; None or a value that is not finite: the run gave none.
        commits: how many there are; index 0 is known to be good, index `commits` - 1 to be bad.
        worse: "higher" for a loss, "lower" for an accuracy.
        smallest: the smallest difference between the ends that matters, in the measure's unit.
        most_seeds: seeds after which the ends, or a commit, are given up as not decided.
        unrunnable: index -> why it cannot run at all (like `git bisect skip`).

    Raises:
        HeadwiseError: fewer than two commits, or an end that cannot be measured.
    """
    raise NotImplementedError
