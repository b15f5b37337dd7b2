"""Numbers known by hand or from the per-head metrics study, and the laws that hold for any numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headwise.analysis.statistics import half_width, holm, paired, relative, summarize, t_quantile

values = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 6))
probabilities = st.floats(0, 1, allow_nan=False)


def test_half_width_of_the_per_head_metrics_study() -> None:
    assert half_width(0.006252, 3) == pytest.approx(0.015531, abs=5e-7)
    assert t_quantile(3) == pytest.approx(4.302652729749464, rel=2e-11)  # scipy 1.13 is off by 1.3e-11


def test_summary_of_one_two_three() -> None:
    summary = summarize([1.0, 2.0, 3.0])
    assert (summary.n, summary.mean, summary.std) == (3, 2.0, 1.0)
    assert summary.ci95 == pytest.approx(4.302652729749464 / math.sqrt(3), rel=2e-11)
    assert summary.low == pytest.approx(2.0 - summary.ci95)
    assert summary.high == pytest.approx(2.0 + summary.ci95)


def test_one_value_has_no_interval() -> None:
    summary = summarize([1.5])
    assert (summary.n, summary.mean, summary.std, summary.ci95) == (1, 1.5, None, None)
    assert summary.low is None
    assert summary.high is None
    with pytest.raises(ValueError, match="n = 1"):
        half_width(0.1, 1)


def test_no_value() -> None:
    assert summarize([]).n == 0
    assert summarize([]).mean is None


def test_equal_values_have_exactly_no_spread() -> None:
    summary = summarize([10.82583999633789] * 3)  # the per-head metrics study's own final losses
    assert (summary.mean, summary.std, summary.ci95) == (10.82583999633789, 0.0, 0.0)


def test_what_is_not_finite_is_never_averaged() -> None:
    with pytest.raises(ValueError, match="not finite"):
        summarize([1.0, float("nan")])


def test_paired_by_hand() -> None:
    # differences 1, 2, 3: t = 2 / (1/√3) = 3.4641 with 2 degrees of freedom, p = 0.0742
    result = paired({0: 1.0, 1: 1.0, 2: 1.0, 7: 9.0}, {0: 2.0, 1: 3.0, 2: 4.0, 8: 0.0})
    assert result.seeds == (0, 1, 2)
    assert result.difference.mean == 2.0
    assert result.p_t == pytest.approx(0.07417990022744857, rel=1e-9)
    assert result.p_wilcoxon is None


def test_paired_agrees_with_scipy() -> None:
    from scipy import stats

    a = dict(enumerate([2.1, 2.3, 2.0, 2.4, 2.2, 2.6, 2.5]))
    b = dict(enumerate([2.0, 2.25, 2.1, 2.1, 2.15, 2.2, 2.52]))
    result = paired(a, b)
    assert result.p_t == pytest.approx(stats.ttest_rel(list(b.values()), list(a.values())).pvalue)
    assert result.p_wilcoxon == pytest.approx(stats.wilcoxon(list(b.values()), list(a.values())).pvalue)


def test_paired_without_a_common_seed_has_no_test() -> None:
    result = paired({0: 1.0}, {1: 2.0})
    assert (result.seeds, result.difference.n, result.p_t) == ((), 0, None)


def test_paired_on_one_seed_gives_a_difference_and_no_interval() -> None:
    result = paired({0: 1.0}, {0: 1.25})
    assert result.difference.mean == 0.25
    assert result.difference.ci95 is None
    assert result.p_t is None


def test_constant_differences() -> None:
    assert paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p_t == 1.0
    assert paired({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}).p_t == 0.0
    same = {s: float(s) for s in range(6)}
    assert paired(same, same).p_wilcoxon == 1.0


def test_relative_difference() -> None:
    summary = relative({0: 2.0, 1: 4.0}, {0: 2.1, 1: 4.2})
    assert summary.mean == pytest.approx(0.05)
    with pytest.raises(ValueError, match="reference of 0"):
        relative({0: 0.0}, {0: 1.0})


def test_holm_by_hand() -> None:
    # Sorted 0.01 0.03 0.04 times 3 2 1 = 0.03 0.06 0.04, made monotone: 0.03 0.06 0.06
    assert holm([0.04, 0.01, None, 0.03]) == pytest.approx([0.06, 0.03, None, 0.06])


@settings(deadline=None)
@given(st.lists(values, min_size=2, max_size=8), st.floats(-100, 100), st.floats(0.01, 100))
def test_shift_and_scale(data: list[float], shift: float, scale: float) -> None:
    base, moved = summarize(data), summarize([scale * x + shift for x in data])
    assert moved.mean == pytest.approx(scale * base.mean + shift, rel=1e-6, abs=1e-6)
    assert moved.ci95 == pytest.approx(scale * base.ci95, rel=1e-5, abs=1e-6)


@settings(deadline=None)
@given(st.lists(values, min_size=2, max_size=8))
def test_order_does_not_matter(data: list[float]) -> None:
    forward, backward = summarize(data), summarize(data[::-1])
    assert forward.mean == pytest.approx(backward.mean, rel=1e-12, abs=1e-12)
    assert forward.std == pytest.approx(backward.std, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(values, values), min_size=2, max_size=8))
def test_paired_is_antisymmetric(pairs: list[tuple[float, float]]) -> None:
    a, b = ({s: p[i] for s, p in enumerate(pairs)} for i in (0, 1))
    forward, backward = paired(a, b), paired(b, a)
    assert forward.difference.mean == pytest.approx(-backward.difference.mean)
    assert forward.p_t == pytest.approx(backward.p_t)


@settings(deadline=None)
@given(st.lists(st.tuples(values, values), min_size=3, max_size=8))
def test_interval_excludes_zero_exactly_when_p_is_small(pairs: list[tuple[float, float]]) -> None:
    result = paired({s: p[0] for s, p in enumerate(pairs)}, {s: p[1] for s, p in enumerate(pairs)})
    assume(abs(result.p_t - 0.05) > 1e-6)
    excludes = not (result.difference.low <= 0 <= result.difference.high)
    assert excludes == (result.p_t < 0.05)


@settings(deadline=None)
@given(st.lists(probabilities, max_size=10))
def test_holm_laws(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    by_p = [c for _, c in sorted(zip(p_values, corrected, strict=True))]
    assert by_p == sorted(by_p)
