"""Entropy against importance: one r a run, one test over runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headwise.analysis.importance import head_correlation, signal

correlations = st.lists(st.floats(-0.99, 0.99), min_size=2, max_size=6)


def test_r_is_pearsons_over_the_heads_of_all_layers() -> None:
    rng = np.random.default_rng(1)
    entropy, importance = rng.standard_normal((2, 3, 4))
    expected = stats.pearsonr(entropy.ravel(), importance.ravel()).statistic
    assert head_correlation(entropy.tolist(), importance.tolist()) == pytest.approx(expected)


def test_heads_without_a_value_are_left_out_and_layers_may_differ_in_heads() -> None:
    entropy = [[1.0, 2.0, math.nan], [4.0, 3.5]]
    importance = [[0.1, 0.2, 9.0], [0.5, math.nan]]
    expected = stats.pearsonr([1.0, 2.0, 4.0], [0.1, 0.2, 0.5]).statistic
    assert head_correlation(entropy, importance) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("entropy", "importance"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]]),  # two points always lie on a line
        ([[1.0, 1.0, 1.0]], [[1.0, 2.0, 3.0]]),
        ([[1.0, 2.0, 3.0]], [[0.5, 0.5, 0.5]]),
        ([[1.0, 2.0, 3.0]], [[1.0, 2.0], [3.0]]),
        ([], []),
    ],
)
def test_no_correlation_where_there_is_none_to_measure(entropy: list, importance: list) -> None:
    assert head_correlation(entropy, importance) is None


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=12),
    st.sampled_from([1e-12, 1e-3, 1.0, 1e9]),
    st.integers(-9, 9),
)
def test_r_does_not_depend_on_unit_or_zero(pairs: list[tuple[int, int]], scale: float, shift: int) -> None:
    x, y = ([[float(p[i]) for p in pairs]] for i in (0, 1))
    moved = head_correlation([[v + shift for v in x[0]]], [[scale * v for v in y[0]]])
    flipped = head_correlation(x, [[-v for v in y[0]]])
    before = head_correlation(x, y)
    if before is None:
        assert moved is flipped is None
    else:
        assert (moved, flipped) == pytest.approx((before, -before), abs=1e-9)


def test_runs_and_not_heads_are_counted() -> None:
    found = signal({0: -0.6, 1: -0.7, 2: -0.5})
    z = np.arctanh([-0.6, -0.7, -0.5])
    assert found.p == pytest.approx(stats.ttest_1samp(z, 0).pvalue)
    assert found.r == pytest.approx(math.tanh(z.mean()))
    low, high = stats.t.interval(0.95, 2, z.mean(), z.std(ddof=1) / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx((math.tanh(low), math.tanh(high)))
    one = signal({3: 0.99})
    assert (one.r, one.low, one.p) == (pytest.approx(0.99), None, None)
    assert signal({}).r is None


@settings(deadline=None)
@given(correlations)
def test_the_interval_of_r_lies_within_one_and_agrees_with_p(values: list[float]) -> None:
    found = signal(dict(enumerate(values)))
    assert -1 <= found.low <= found.r <= found.high <= 1
    if abs(found.p - 0.05) > 1e-6:
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


def test_perfect_correlations_have_finite_numbers() -> None:
    found = signal({0: 1.0, 1: 1.0, 2: 0.9})
    assert all(math.isfinite(v) for v in (found.r, found.low, found.high, found.p))
