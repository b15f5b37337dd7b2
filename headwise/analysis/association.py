"""How two numbers of the same things go together: intervals of correlations, and tests by drawing anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
"""Resamples of the bootstrap, and permutations."""
FEWEST = 4
"""Pairs of a correlation with an interval: Fisher's z divides by √(n - 3)."""
_Z95 = 1.959963984540054
_LARGEST = 1 - 1e-12


@dataclass(frozen=True)
class Ranked:
    """Spearman's rank correlation of n pairs.

    Attributes:
        n: pairs with both values.
        rho: None where there are under four, or one of the two does not vary.
        low, high: 95% interval, the percentiles of a bootstrap over pairs.
        p: two-sided, by permutation; never 0, for the order at hand counts as one of them.
    """

    n: int
    rho: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def fisher_interval(r: float | None, n: int) -> tuple[float, float] | None:
    """The 95% interval of Pearson's r of n independent pairs, by Fisher's z; None under four pairs."""
    if r is None or n < FEWEST:
        return None
    z, half = math.atanh(max(-_LARGEST, min(_LARGEST, r))), _Z95 / math.sqrt(n - 3)
    return math.tanh(z - half), math.tanh(z + half)


def spearman(x: Sequence[float], y: Sequence[float], *, seed: int = 0, draws: int = DRAWS) -> Ranked:
    """Rank correlation with a bootstrap interval and a permutation p-value; ties share their mean rank.

    Args:
        x, y: values of the same things; a pair with a value that is not finite is left out.
        seed: of the draws.
        draws: resamples, and permutations.

    Raises:
        ValueError: x and y differ in length.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"x has {a.size} values and y has {b.size}")
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    n = a.size
    if n < FEWEST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Ranked(n, None)
    from scipy.stats import rankdata

    rng = np.random.default_rng(seed)
    ranks = rankdata(a), rankdata(b)
    rho = float(_correlation(ranks[0][None], ranks[1][None])[0])
    order = rng.permuted(np.broadcast_to(ranks[1], (draws, n)), axis=1)
    chance = np.abs(_correlation(np.broadcast_to(ranks[0], (draws, n)), order))
    p = (1 + int((chance >= abs(rho) - 1e-12).sum())) / (1 + draws)
    chosen = rng.integers(n, size=(draws, n))
    again = _correlation(rankdata(a[chosen], axis=1), rankdata(b[chosen], axis=1))
    again = again[np.isfinite(again)]
    low, high = (float(v) for v in np.percentile(again, (2.5, 97.5))) if again.size else (None, None)
    return Ranked(n, rho, low, high, p)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r of each row, `(N, n)` to `(N,)`; NaN where a row does not vary."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    size = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size > 0, (x * y).sum(1) / size, np.nan)
