"""Which commit made a loss worse: bisection that measures as many seeds as the noise asks for, and no more.

**The ends** are measured seed by seed until the interval of bad - good (paired by seed, valid at every look:
`headwise.analysis.sequential`) leaves 0 out. Where it does not, there is no regression to look for.

**A commit between** is held against both ends on the same seeds. Two models explain the values: the commit
lies on the level of the good end, or on that of the bad end. In both the value is the level of the commit
plus an effect of the seed plus noise of one spread; the commits settled before have levels of their own and
add to what is known of the noise. With flat priors the ratio of the likelihoods is (RSS_good/RSS_bad)^(df/2),
and seeds are added until it is beyond (1 - ε)/ε either way (the sequential probability ratio test of Wald
1945), with ε = 0.05 / log2(commits), so that all steps together go wrong in at most about 5% of bisections.

Runs of one seed that give the same number digit for digit are the same computation, so that one run settles a
commit that changes no number. A commit that cannot run is skipped, as `git bisect skip` does, and so is one
that stays between the levels. Where the level changes several times, one of the changes from good to bad is
found, as `git bisect` does.
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
"""Of all the steps between the ends together."""


@dataclass(frozen=True)
class Found:
    """What a bisection ends with.

    Attributes:
        first_bad: index of the first commit that is worse; None where there is none or several are possible.
        candidates: indices one of which is the first bad commit: one where it was found, several where
            commits before it could not be measured or decided, none where the ends do not differ.
        difference: bad end - good end over their common seeds, with the interval that holds at every look.
        runs: how many measurements were used.
        skipped: index -> why it was not measured or not decided.
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
    """The next step of a bisection.

    Attributes:
        measure: (index, seed) pairs to run now, in any order or side by side; empty where `found` is given.
        found: the answer; None while runs are missing.
        low, high: the last index known to be good and the first known to be bad so far; None while the ends
            are compared, or where they do not differ.
        why: what the runs of `measure` are for.
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
    """What to measure next, or the answer: a pure function of the measurements so far.

    A driver calls it, measures what it asks for, adds that to `measured` and calls again. What was measured
    and is not asked for changes nothing.

    Args:
        measured: (index, seed) -> value; None or a value that is not finite where the run gave none.
        commits: how many there are, oldest first. Index 0 is said to be good, the last one to be bad.
        worse: `higher` for a loss, `lower` for an accuracy.
        smallest: the smallest difference between the ends that matters; with it the search for a regression
            ends as soon as a difference that large is excluded.
        most_seeds: seeds after which the ends, or a commit, are given up as not decided; at least 3.
        unrunnable: index -> why it cannot run at all.

    Raises:
        HeadwiseError: fewer than two commits, a bound that cannot be, or an end that cannot run.
    """
    one_of("worse", worse, ("higher", "lower"))
    if commits < 2:
        raise HeadwiseError(f"there are {commits} commits to bisect; give a good one and a later bad one")
    if most_seeds < LEAST:
        raise HeadwiseError(f"most_seeds is {most_seeds}; two ends are compared on at least {LEAST} seeds")
    if not 0 <= smallest < math.inf:
        raise HeadwiseError(f"smallest is {smallest}; it must be a number of at least 0")
    skipped = dict(unrunnable or {})
    for end, index in (("good", 0), ("bad", commits - 1)):
        if index in skipped:
            raise HeadwiseError(f"the {end} end cannot run: {skipped[index]}; choose another commit for it")
    search = _Search(measured, commits, 1.0 if worse == "higher" else -1.0, smallest, most_seeds, skipped)
    try:
        return search.ends() or search.between()
    except _Missing as missing:
        return Step(missing.pairs, None, search.low, search.high, missing.why)


class _Missing(Exception):
    """Runs that are needed and not there yet."""

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
        """The measurement with its sign, so that worse is higher; None where the run gave no value."""
        self.used.add((index, seed))
        value = self.measured[index, seed]
        return self.sign * value if usable(value) else None

    def need(self, pairs: Sequence[tuple[int, int]], why: str) -> None:
        """Ask for the runs among `pairs` that are not there."""
        missing = [pair for pair in pairs if pair not in self.measured]
        if missing:
            raise _Missing(missing, why)

    def common_seeds(self, why: str) -> Iterator[int]:
        """Seeds on which both ends have a value, in order; those where one has none count as tried."""
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
                return self.none("both ends give the same number, digit for digit")
            for end, index, value in (("good", 0, good), ("bad", last, bad)):
                same = [s for s in self.seeds if fine(value) and self.value(index, s) == value]
                if same:
                    return self.none(
                        f"seeds {same[0]} and {seed} of the {end} end give the same number, digit for digit, "
                        "so that the noise cannot be seen"
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
                return self.none(f"the bad end is better than the good one: it differs by {interval}")
            if high <= self.smallest:
                return self.none(
                    f"no regression that matters: the ends differ by {interval}, at most {self.smallest:g}"
                )
            if low > 0:
                self.low, self.high = 0, last
                return None
        return self.undecided_ends()

    def undecided_ends(self) -> Step | None:
        """After the last seed; None where the ends differ by the same amount on every seed."""
        found, n = self.difference, self.difference.n
        if n < LEAST:
            tried = self.most_seeds
            return self.none(
                f"the ends cannot be compared: {n} of {tried} seeds gave a value at both of them"
            )
        if found.std == 0 and found.mean:
            if found.mean > 0:
                self.low, self.high = 0, self.commits - 1
                return None
            return self.none(
                f"the bad end is better than the good one by {-found.mean:.4g} on each of {n} seeds"
            )
        return self.none(
            f"no regression beyond the noise: after {n} seeds the interval of the difference, "
            f"[{found.low:+.4g}, {found.high:+.4g}], still holds 0"
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
            why = f"commit {candidates[0]} is the first that is worse; {size}"
        else:
            between = ", ".join(f"{i} ({self.skipped[i]})" for i in candidates[:-1])
            why = f"the first worse commit is one of {candidates[0]} to {candidates[-1]}; {size}"
            why += f"; skipped: {between}"
        first = candidates[0] if len(candidates) == 1 else None
        return self.end(first, candidates, why)

    def classify(self, index: int, threshold: float) -> bool | None:
        """Whether the commit is as bad as the bad end; None where it is skipped, and `skipped` says why."""
        last, seeds = self.commits - 1, list(self.seeds)
        probes: dict[int, float] = {}
        why = f"commit {index}: as the good end or as the bad one?"
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
        """An end or a settled commit that gave this number on this seed, digit for digit."""
        if not fine(value):
            return None
        for index in (0, self.commits - 1):
            if self.value(index, seed) == value:
                return index
        return next((index for index, of in self.settled.items() if of.get(seed) == value), None)

    def repeat(self, index: int, other: int) -> bool | None:
        """The verdict on a commit that computes what `other` does."""
        if other in (0, self.commits - 1):
            return other != 0
        if other in self.skipped:
            self.skipped[index] = f"the same numbers as commit {other}"
            return None
        return self.verdicts[other]

    def log_ratio(self, seeds: Sequence[int], probes: Mapping[int, float]) -> float:
        """Log of how much likelier the values are with the commit on the bad level than on the good one."""
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
    """log of (RSS_good/RSS_bad)^(df/2) of value ~ level of the commit + effect of the seed.

    Args:
        known: (index, seed, value) of both ends and of settled commits, each of which has a level of its own.
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
