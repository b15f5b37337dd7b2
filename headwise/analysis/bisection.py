"""Finds the commit that made a loss worse by bisection, with only as many seeds as the noise requires.

**The ends** are measured seed by seed until the interval of bad - good (paired by seed, valid at every look:
`headwise.analysis.sequential`) excludes 0. If it never does, there is no regression to find.

**A commit between them** is compared with both ends on the same seeds, under two models: the commit has the
level of the good end, or that of the bad end. In both models a value is the level of the commit plus an
effect of the seed plus noise of one spread; commits decided earlier have levels of their own and improve the
estimate of the noise. With flat priors the likelihood ratio is (RSS_good/RSS_bad)^(df/2). Seeds are added
until it exceeds (1 - ε)/ε in either direction (the sequential probability ratio test of Wald 1945), with ε =
0.05 / log2(commits), so that at most about 5% of bisections contain a wrong step.

Two runs with one seed and exactly the same value are the same computation, so that one run decides a commit
that changes no number. A commit that cannot run is skipped, as with `git bisect skip`, and so is a commit
that stays between the levels. If the level changes several times, one of the changes from good to bad is
found, as with `git bisect`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from headwise.analysis.seeds import fine, summarize_differences, usable
from headwise.analysis.sequential import LEAST, anytime
from headwise.analysis.statistics import Summary, summarize
from headwise.errors import HeadwiseError, one_of

MOST_SEEDS = 16
ERROR_RATE = 0.05
"""The error rate of all steps between the ends together."""


@dataclass(frozen=True)
class Found:
    """The result of a bisection.

    Attributes:
        first_bad: the index of the first worse commit; None if there is none, or if several are possible.
        candidates: the indices of all commits that may be the first bad one: one if it was found, several if
            commits before it could not be measured or decided, none if the ends do not differ.
        difference: bad end - good end over their common seeds, with the interval that is valid at every look.
        runs: the number of measurements used.
        skipped: index -> the reason why the commit was not measured or not decided.
        why: one sentence with the numbers.
    """

    first_bad: int | None
    candidates: tuple[int, ...]
    difference: Summary
    runs: int
    skipped: dict[int, str]
    why: str


@dataclass(frozen=True)
class Step:
    """The next step of a bisection.

    Attributes:
        measure: (index, seed) pairs to run now, in any order or at the same time; empty once `found` is
            given.
        found: the result; None while runs are missing.
        low, high: the last index known to be good and the first known to be bad so far; None while the ends
            are compared, or if they do not differ.
        why: the purpose of the runs in `measure`.
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
    most_seeds: int = MOST_SEEDS,
    unrunnable: Mapping[int, str] | None = None,
) -> Step:
    """The next measurements, or the result: a pure function of the measurements so far.

    A driver calls it, runs the requested measurements, adds them to `measured` and calls it again.
    Measurements that were not requested have no effect.

    Args:
        measured: (index, seed) -> value; None or a value that is not finite for a run without a value.
        commits: the number of commits, oldest first. Index 0 is the good end, the last index the bad end.
        worse: `higher` for a loss, `lower` for an accuracy.
        smallest: the smallest difference between the ends that matters; with it the search for a regression
            ends as soon as a difference that large is excluded.
        most_seeds: the number of seeds after which the ends, or a commit, count as undecided; at least 3.
        unrunnable: index -> the reason why the commit cannot run at all.

    Raises:
        HeadwiseError: fewer than two commits, an invalid bound, or an end that cannot run.
    """
    one_of("worse", worse, ("higher", "lower"))
    if commits < 2:
        raise HeadwiseError(f"there are {commits} commits to bisect; give a good commit and a later bad one")
    if most_seeds < LEAST:
        raise HeadwiseError(f"most_seeds is {most_seeds}; comparing the ends needs at least {LEAST} seeds")
    if not 0 <= smallest < math.inf:
        raise HeadwiseError(f"smallest is {smallest}; it must be a number of at least 0")
    skipped = dict(unrunnable or {})
    for end, index in (("good", 0), ("bad", commits - 1)):
        if index in skipped:
            raise HeadwiseError(f"the {end} commit cannot run: {skipped[index]}; choose another {end} commit")
    search = _Search(measured, commits, 1.0 if worse == "higher" else -1.0, smallest, most_seeds, skipped)
    try:
        return search.ends() or search.between()
    except _Missing as missing:
        return Step(missing.pairs, None, search.low, search.high, missing.why)


class _Missing(Exception):
    """Measurements that are needed and still missing."""

    def __init__(self, pairs: Sequence[tuple[int, int]], why: str) -> None:
        super().__init__(why)
        self.pairs, self.why = tuple(pairs), why


@dataclass
class _Search:
    measured: Mapping[tuple[int, int], float | None]
    commits: int
    sign: float
    smallest: float
    most_seeds: int
    skipped: dict[int, str]
    low: int | None = None
    high: int | None = None
    seeds: list[int] = field(default_factory=list)
    difference: Summary = field(default_factory=lambda: summarize([]))
    settled: dict[int, dict[int, float]] = field(default_factory=dict)
    verdicts: dict[int, bool] = field(default_factory=dict)
    used: set[tuple[int, int]] = field(default_factory=set)

    def value(self, index: int, seed: int) -> float | None:
        """The measurement, signed so that worse is higher; None if the run gave no value."""
        self.used.add((index, seed))
        value = self.measured[index, seed]
        return self.sign * value if usable(value) else None

    def need(self, pairs: Sequence[tuple[int, int]], why: str) -> None:
        """Request the measurements among `pairs` that are missing."""
        missing = [pair for pair in pairs if pair not in self.measured]
        if missing:
            raise _Missing(missing, why)

    def common_seeds(self, why: str) -> Iterator[int]:
        """Seeds on which both ends have a value, in order; other seeds count towards `most_seeds`."""
        last = self.commits - 1
        for seed in range(self.most_seeds):
            # The first seed may show that both ends compute the same; after it, 3 have the first interval.
            batch = range(1, LEAST) if 0 < seed < LEAST else (seed,)
            self.need([(index, s) for s in batch for index in (0, last)], why)
            if self.value(0, seed) is not None and self.value(last, seed) is not None:
                yield seed

    def ends(self) -> Step | None:
        """Compare the ends; None once they differ."""
        last, differences = self.commits - 1, []
        for seed in self.common_seeds("comparing the ends"):
            good, bad = self.value(0, seed), self.value(last, seed)
            assert good is not None
            assert bad is not None
            if good == bad and fine(good):
                return self.none("both ends give exactly the same value")
            for end, index, value in (("good", 0, good), ("bad", last, bad)):
                same = [s for s in self.seeds if fine(value) and self.value(index, s) == value]
                if same:
                    return self.none(
                        f"seeds {same[0]} and {seed} of the {end} end give exactly the same value, so that "
                        "the noise cannot be measured"
                    )
            self.seeds.append(seed)
            differences.append(bad - good)
            values = [self.value(index, s) or 0.0 for index in (0, last) for s in self.seeds]
            self.difference = anytime(summarize_differences(differences, values))
            low, high = self.difference.low, self.difference.high
            if low is None or high is None or self.difference.std == 0:
                continue
            interval = f"[{low:+.4g}, {high:+.4g}] over {len(differences)} seeds"
            if high < 0:
                return self.none(f"the bad end is better than the good end: the difference is {interval}")
            if high <= self.smallest:
                return self.none(
                    f"no regression that matters: the ends differ by {interval}, at most {self.smallest:g}"
                )
            if low > 0:
                self.low, self.high = 0, last
                return None
        return self.undecided_ends()

    def undecided_ends(self) -> Step | None:
        """The result after the last seed; None if the bad end is worse by the same amount on every seed."""
        found, n = self.difference, self.difference.n
        if n < LEAST:
            tried = self.most_seeds
            return self.none(
                f"the ends cannot be compared: only {n} of {tried} seeds gave a value at both of them"
            )
        if found.std == 0 and found.mean:
            if found.mean > 0:
                self.low, self.high = 0, self.commits - 1
                return None
            return self.none(
                f"the bad end is better than the good end by {-found.mean:.4g} on each of {n} seeds"
            )
        return self.none(
            f"no regression beyond the noise: after {n} seeds the interval of the difference, "
            f"[{found.low:+.4g}, {found.high:+.4g}], still contains 0"
        )

    def between(self) -> Step:
        """Halve the range until it cannot be halved."""
        assert self.low is not None
        assert self.high is not None
        error = ERROR_RATE / max(1.0, math.ceil(math.log2(self.commits)))
        low, high = self.low, self.high
        while inside := [i for i in range(low + 1, high) if i not in self.skipped]:
            middle = min(inside, key=lambda i: (abs(i - (low + high) / 2), i))
            bad = self.classify(middle, math.log((1 - error) / error))
            if bad is not None:
                low, high = (low, middle) if bad else (middle, high)
            self.low, self.high = low, high
        candidates = tuple(range(low + 1, high + 1))
        ends = self.difference
        size = f"the ends differ by [{ends.low:+.4g}, {ends.high:+.4g}] over {ends.n} seeds"
        if len(candidates) == 1:
            why = f"commit {candidates[0]} is the first worse commit; {size}"
        else:
            between = ", ".join(f"{i} ({self.skipped[i]})" for i in candidates[:-1])
            why = f"the first worse commit is one of {candidates[0]} to {candidates[-1]}; {size}"
            why += f"; skipped: {between}"
        first = candidates[0] if len(candidates) == 1 else None
        return self.end(first, candidates, why)

    def classify(self, index: int, threshold: float) -> bool | None:
        """Whether the commit has the level of the bad end; None if it is skipped, with the reason in
        `skipped`."""
        last, seeds = self.commits - 1, list(self.seeds)
        probes: dict[int, float] = {}
        why = f"comparing commit {index} with both ends"
        for seed in range(self.most_seeds):
            if seed not in self.seeds and seed <= self.seeds[-1]:
                continue  # an end has no value there
            extend = [(0, seed), (last, seed)] if seed not in self.seeds else []
            self.need([(index, seed), *extend], why)
            ends = self.value(0, seed), self.value(last, seed)
            if None in ends:
                continue
            probe = self.value(index, seed)
            if probe is None:
                self.skipped[index] = f"seed {seed} gave no value"
                return None
            same = self.same_computation(seed, probe)
            if same is not None:
                return self.repeat(index, same)
            probes[seed] = probe
            if seed not in seeds:
                seeds.append(seed)
            ratio = self.log_ratio(seeds, probes)
            if abs(ratio) >= threshold:
                self.settled[index], self.verdicts[index] = probes, ratio > 0
                return ratio > 0
        self.settled[index] = probes
        self.skipped[index] = f"between the levels of both ends after {len(probes)} seeds"
        return None

    def same_computation(self, seed: int, value: float) -> int | None:
        """An end or a decided commit that gave exactly this value on this seed."""
        if not fine(value):
            return None
        for index in (0, self.commits - 1):
            if self.value(index, seed) == value:
                return index
        return next((index for index, of in self.settled.items() if of.get(seed) == value), None)

    def repeat(self, index: int, other: int) -> bool | None:
        """The verdict on a commit whose values equal those of `other`."""
        if other in (0, self.commits - 1):
            return other != 0
        if other in self.skipped:
            self.skipped[index] = f"the same values as commit {other}"
            return None
        return self.verdicts[other]

    def log_ratio(self, seeds: Sequence[int], probes: Mapping[int, float]) -> float:
        """Log of the likelihood ratio of the bad level to the good level for the commit."""
        rows = [(index, seed, self.value(index, seed)) for index in (0, self.commits - 1) for seed in seeds]
        rows += [(index, seed, value) for index, of in self.settled.items() for seed, value in of.items()]
        known = tuple((index, seed, value) for index, seed, value in rows if value is not None)
        return _log_ratio(known, tuple(probes.items()), self.commits - 1)

    def none(self, why: str) -> Step:
        return self.end(None, (), why)

    def end(self, first: int | None, candidates: tuple[int, ...], why: str) -> Step:
        found = Found(first, candidates, self.difference, len(self.used), dict(self.skipped), why)
        return Step((), found, self.low, self.high, why)


@lru_cache(maxsize=4096)
def _log_ratio(
    known: tuple[tuple[int, int, float], ...], probes: tuple[tuple[int, float], ...], last: int
) -> float:
    """Log of (RSS_good/RSS_bad)^(df/2) of the model value ~ level of the commit + effect of the seed.

    Args:
        known: (index, seed, value) of both ends and of decided commits, each with a level of its own.
        probes: (seed, value) of the commit in question, which has the level of index 0 or of index `last`.
    """
    values = np.array([value for *_, value in known] + [value for _, value in probes])
    seeds = [seed for _, seed, _ in known] + [seed for seed, _ in probes]
    rest = []
    for level in (0, last):
        levels = [index for index, *_ in known] + [level] * len(probes)
        design = np.hstack([_dummies(levels), _dummies(seeds)[:, 1:]])
        fitted, _, rank, _ = np.linalg.lstsq(design, values - values.mean(), rcond=None)
        rest.append(float(np.square(values - values.mean() - design @ fitted).sum()))
    rounding = 1e-300 + 1e-24 * float(np.square(values).sum())
    good, bad = (max(found, rounding) for found in rest)
    return (len(values) - int(rank)) / 2 * math.log(good / bad)


def _dummies(names: Sequence[int]) -> np.ndarray:
    return (np.array(names)[:, None] == np.unique(names)[None, :]).astype(float)
