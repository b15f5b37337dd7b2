"""Intervals of correlations, held against scipy and against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headwise.analysis.association import fisher_interval, spearman

values = st.lists(st.integers(-9, 9), min_size=5, max_size=20)


@settings(max_examples=30)
@given(x=values, seed=st.integers(0, 2**31))
def test_rho_is_scipys_and_lies_in_its_interval(x: list[int], seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=len(x))
    found = spearman(x, y, draws=200)
    if len(set(x)) == 1:
        assert found.rho is None
        return
    assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found.p is not None
    assert 1 / 201 <= found.p <= 1


def test_the_permutation_p_is_that_of_all_permutations() -> None:
    x, y = [1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 6, 5]
    exact = stats.permutation_test(
        (x,), lambda a: stats.spearmanr(a, y).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert spearman(x, y, draws=20_000).p == pytest.approx(exact.pvalue, abs=0.01)


def test_noise_is_rarely_significant_and_an_order_always_is() -> None:
    rng = np.random.default_rng(0)
    p = [spearman(rng.normal(size=12), rng.normal(size=12), draws=200).p for _ in range(100)]
    assert sum(one < 0.05 for one in p) <= 12
    found = spearman(np.arange(12), np.exp(np.arange(12)))
    assert found.rho == pytest.approx(1)
    assert found.p < 0.001
    assert found.low > 0.9


def test_the_bootstrap_covers_the_truth() -> None:
    rng, truth = np.random.default_rng(1), 6 / math.pi * math.asin(0.6 / 2)
    inside = 0
    for _ in range(60):
        x, noise = rng.normal(size=(2, 40))
        found = spearman(x, 0.6 * x + 0.8 * noise, draws=300)
        inside += found.low <= truth <= found.high
    assert inside >= 51


def test_pairs_that_are_not_known_are_left_out() -> None:
    found = spearman([1, 2, math.nan, 4, 5, 6], [1, 2, 3, math.inf, 5, 6])
    assert (found.n, found.rho) == (4, 1)
    assert spearman([1, 2, 3], [1, 2, 3]).rho is None
    assert spearman([1, 1, 1, 1], [1, 2, 3, 4]).rho is None
    with pytest.raises(ValueError, match="has 2 values and y has 1"):
        spearman([1, 2], [1])


def test_the_same_seed_draws_the_same() -> None:
    x, y = np.random.default_rng(2).normal(size=(2, 9))
    assert spearman(x, y, seed=3) == spearman(x, y, seed=3)


def test_fishers_interval_is_scipys() -> None:
    x, y = np.random.default_rng(3).normal(size=(2, 20))
    theirs = stats.pearsonr(x, y).confidence_interval(0.95)
    r = float(stats.pearsonr(x, y).statistic)
    assert fisher_interval(r, 20) == pytest.approx((theirs.low, theirs.high))
    assert fisher_interval(0.5, 3) is None
    assert fisher_interval(None, 9) is None
    low, high = fisher_interval(1.0, 9)
    assert 0.99 < low <= high <= 1
