"""Intervals that hold at every look: the formula, its laws, and looking after each seed, simulated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from headwise.analysis import statistics
from headwise.analysis.sequential import PRIOR_STD, anytime, detectable, half_width, least_seeds, p_value
from headwise.analysis.statistics import summarize

counts = st.integers(3, 200)
spreads = st.floats(1e-6, 1e6)
confidences = st.sampled_from([0.5, 0.9, 0.95, 0.975, 1 - 0.05 / 3, 0.995])


@pytest.mark.parametrize(("t", "n"), [(0.5, 3), (4.0, 3), (3.0, 8), (6.0, 20)])
def test_the_p_value_is_the_inverse_bayes_factor_by_numerical_integration(t: float, n: int) -> None:
    def weighed(delta: float) -> float:
        return float(stats.nct.pdf(t, n - 1, delta * math.sqrt(n)) * stats.norm.pdf(delta, 0, PRIOR_STD))

    reach = 12 * (1 + t / math.sqrt(n))
    factor = integrate.quad(weighed, -reach, reach, limit=400)[0] / stats.t.pdf(t, n - 1)
    assert p_value(t / math.sqrt(n), 1.0, n) == pytest.approx(min(1.0, 1 / factor), rel=1e-6)


@settings(deadline=None)
@given(counts, spreads, confidences)
def test_interval_and_p_value_belong_together(n: int, std: float, confidence: float) -> None:
    half = half_width(std, n, confidence)
    if half is None:
        assert p_value(1e9 * std, std, n) > 1 - confidence
        return
    assert p_value(half, std, n) == pytest.approx(1 - confidence, rel=1e-6)
    assert half > statistics.half_width(std, n, confidence)  # looking often costs something
    assert half == pytest.approx(std * half_width(1.0, n, confidence), rel=1e-9)


@settings(deadline=None)
@given(counts, confidences, st.integers(1, 100))
def test_more_seeds_narrow_it_and_more_confidence_widens_it(n: int, confidence: float, more: int) -> None:
    here, later = half_width(1.0, n, confidence), half_width(1.0, n + more, confidence)
    surer = half_width(1.0, n, confidence + 0.004)
    if here is not None:
        assert later < here
        assert surer is None or surer > here


@given(st.floats(0, 1e3), st.floats(1.01, 10), spreads, counts)
def test_a_p_value_falls_with_the_distance_and_knows_no_sign(
    d: float, more: float, std: float, n: int
) -> None:
    assert 0 <= p_value(d * more * std, std, n) <= p_value(d * std, std, n) <= 1
    assert p_value(-d * std, std, n) == p_value(d * std, std, n)


def test_two_seeds_have_no_interval_and_three_have_one_for_up_to_three_comparisons() -> None:
    assert half_width(1.0, 2) is None
    assert half_width(1.0, 2, 0.5) is None
    assert anytime(summarize([1.0, 2.0])).ci95 is None
    assert anytime(summarize([1.0])).ci95 is None
    assert p_value(1e9, 1e-9, 2) == 1.0
    assert [least_seeds(1 - 0.05 / m) for m in (1, 3, 4)] == [3, 3, 4]


def test_looking_after_every_seed_stays_below_the_error_rate_where_a_t_interval_does_not() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 40))
    n = np.arange(1, 41)
    mean = x.cumsum(1) / n
    std = np.sqrt(np.maximum((x**2).cumsum(1) - n * mean**2, 0) / np.maximum(n - 1, 1))
    looks = range(3, 41)
    ours = np.array([half_width(1.0, k) for k in looks])
    fixed = np.array([statistics.half_width(1.0, k) for k in looks])
    t = np.abs(mean[:, 2:]) / std[:, 2:]
    assert (t > ours).any(1).mean() <= 0.05
    assert (t > fixed).any(1).mean() > 0.2


def test_the_detectable_difference_is_found_as_often_as_promised() -> None:
    true = detectable(2.0, 5)
    x = true + 2.0 * np.random.default_rng(0).standard_normal((20_000, 5))
    seen = np.abs(x.mean(1)) > x.std(1, ddof=1) * half_width(1.0, 5)
    assert seen.mean() == pytest.approx(0.8, abs=0.01)
    assert detectable(2.0, 2) is None
