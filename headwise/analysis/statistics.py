"""Statistics over seeds: summaries, paired comparisons, correction for many comparisons.

The interval of a mean is Student's, `t_{0.975,n-1}·std/√n` with the sample standard deviation
(ddof = 1). One seed has no spread: its `std` and `ci95` are None, never 0.

Several variants against one baseline are corrected by max-t: the critical value is the 95% quantile
of the largest |t| of `comparisons` independent variants, so that each of them is tested at
`1 - 0.95^(1/comparisons)` (Šidák 1967). Variants that share the baseline's seeds depend on each
other, which makes the largest |t| smaller, so that the intervals are on the wide side (proven for
known spreads and for two variants; for more, a test simulates it). Interval
(`simultaneous`) and p-value (`max_t`) come from the same critical value, so an interval excludes 0
exactly where its p-value is below 0.05. Holm's step-down p-values reject a little more often, but no
intervals of 95% simultaneous coverage belong to them; they serve where p-values stand alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

WILCOXON_MIN_N = 6  # below it the exact two-sided test cannot reach p < 0.05


@dataclass(frozen=True)
class Summary:
    """Mean over `n` seeds, sample standard deviation, half-width of the mean's 95% interval."""

    n: int
    mean: float | None
    std: float | None
    ci95: float | None

    @property
    def low(self) -> float | None:
        """Lower end of the 95% interval; None where there is none."""
        return None if self.mean is None or self.ci95 is None else self.mean - self.ci95

    @property
    def high(self) -> float | None:
        """Upper end of the 95% interval; None where there is none."""
        return None if self.mean is None or self.ci95 is None else self.mean + self.ci95


@dataclass(frozen=True)
class Paired:
    """Difference `b - a` of two variants over the seeds that both have.

    `difference` carries n, mean, std and half-width; `p_t` is the paired t test's two-sided p,
    `p_wilcoxon` the signed-rank test's (None below 6 pairs).
    """

    seeds: tuple[int, ...]
    difference: Summary
    p_t: float | None
    p_wilcoxon: float | None


@lru_cache(maxsize=256)
def t_quantile(n: int, confidence: float = 0.95) -> float:
    """Two-sided Student t quantile for the mean of `n` values (n - 1 degrees of freedom)."""
    from scipy.special import stdtrit  # the function behind scipy.stats.t.ppf, quick to import

    return float(stdtrit(n - 1, 0.5 + confidence / 2))


def half_width(std: float, n: int, confidence: float = 0.95) -> float:
    """`t·std/√n`: half the width of the mean's interval.

    Raises:
        ValueError: n < 2; one value has no interval.
    """
    if n < 2:
        raise ValueError(f"an interval needs at least 2 values, got n = {n}")
    return t_quantile(n, confidence) * std / math.sqrt(n)


def summarize(values: Iterable[float]) -> Summary:
    """n, mean, sample std and 95% half-width of `values`.

    Raises:
        ValueError: a value is not finite; such runs are reported apart, never averaged in.
    """
    data = np.asarray(list(values), dtype=np.float64)
    if not np.isfinite(data).all():
        raise ValueError(f"cannot summarize values that are not finite: {data.tolist()}")
    n = data.size
    if n == 0:
        return Summary(0, None, None, None)
    # Equal values have exactly no spread; numpy's rounding would leave 1e-16 of it.
    mean = float(data[0]) if np.all(data == data[0]) else float(data.mean())
    if n == 1:
        return Summary(1, mean, None, None)
    std = math.sqrt(float(np.square(data - mean).sum()) / (n - 1))
    return Summary(n, mean, std, half_width(std, n))


def spread_interval(std: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Where the true standard deviation lies, by chi-square with n - 1 degrees of freedom.

    Raises:
        ValueError: n < 2; one value has no spread.
    """
    if n < 2:
        raise ValueError(f"a spread needs at least 2 values, got n = {n}")
    from scipy.special import chdtri

    tail = (1 - confidence) / 2
    return tuple(std * math.sqrt((n - 1) / float(chdtri(n - 1, p))) for p in (tail, 1 - tail))  # type: ignore[return-value]


def simultaneous(summary: Summary, comparisons: int) -> Summary:
    """The same mean with the half-width that holds for `comparisons` means at once, by max-t.

    With one comparison it is the interval of the mean alone.
    """
    if summary.std is None or comparisons < 2:
        return summary
    return replace(summary, ci95=half_width(summary.std, summary.n, 0.95 ** (1 / comparisons)))


def max_t(p: float | None, comparisons: int) -> float | None:
    """The p-value of `simultaneous`: the chance that the largest of `comparisons` |t| is as extreme."""
    if p is None or comparisons < 2:
        return p
    return 1.0 if p >= 1 else -math.expm1(comparisons * math.log1p(-p))


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired:
    """Compare `b` with `a` seed by seed, on the seeds they share.

    Args:
        a: seed -> value of the reference.
        b: seed -> value of the variant.
    """
    seeds = tuple(sorted(set(a) & set(b)))
    differences = [b[seed] - a[seed] for seed in seeds]
    summary = summarize(differences)
    return Paired(seeds, summary, _p_t(summary), _p_wilcoxon(differences))


def relative(a: Mapping[int, float], b: Mapping[int, float]) -> Summary:
    """Summary of `b/a - 1` over the seeds that both have (0.05 = 5% above the reference).

    Raises:
        ValueError: a reference value is 0.
    """
    seeds = sorted(set(a) & set(b))
    if any(a[seed] == 0 for seed in seeds):
        raise ValueError("a relative difference to a reference of 0 is not defined")
    return summarize(b[seed] / a[seed] - 1 for seed in seeds)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; the order is kept, None (no test) stays None and is not counted."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    floor = 0.0
    for rank, (p, i) in enumerate(tested):
        floor = max(floor, min(1.0, (len(tested) - rank) * p))
        corrected[i] = floor
    return corrected


def _p_t(difference: Summary) -> float | None:
    if difference.n < 2 or difference.mean is None or difference.std is None:
        return None
    if difference.std == 0:
        return 1.0 if difference.mean == 0 else 0.0
    from scipy.special import stdtr

    t = abs(difference.mean) / (difference.std / math.sqrt(difference.n))
    return float(2 * stdtr(difference.n - 1, -t))


def _p_wilcoxon(differences: Sequence[float]) -> float | None:
    if len(differences) < WILCOXON_MIN_N:
        return None
    if not any(differences):
        return 1.0
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue)
