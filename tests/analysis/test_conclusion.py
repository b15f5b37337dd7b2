"""Better, worse, equivalent or undecided: known numbers, and the laws that hold for any."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from headwise.analysis.conclusion import Conclusion, conclude, further_seeds, smallest_difference
from headwise.analysis.further import in_words
from headwise.analysis.statistics import Summary, half_width, max_t, paired, simultaneous, summarize
from headwise.errors import HeadwiseError

differences = st.lists(st.floats(-10, 10).map(lambda x: round(x, 4)), min_size=2, max_size=5)
smallest_values = st.floats(1e-3, 5).map(lambda x: round(x, 4))
families = st.integers(1, 12)
OPPOSITE = {"better": "worse", "worse": "better", "equivalent": "equivalent", "undecided": "undecided"}


def concluded(values: list[float], smallest: float, comparisons: int = 1, sign: float = 1.0) -> Conclusion:
    base = dict.fromkeys(range(len(values)), 0.0)
    return conclude(paired(base, {s: sign * v for s, v in enumerate(values)}), smallest, comparisons)


def of(mean: float, std: float, n: int) -> list[float]:
    """n values with exactly this mean and sample standard deviation, as far as floats go."""
    shape = np.linspace(-1, 1, n)
    return (mean + std * shape / shape.std(ddof=1)).tolist()


def test_the_half_width_of_the_per_head_metrics_study_is_the_interval_of_one_variant_alone() -> None:
    values = of(0.0, 0.006252, 3)
    found = concluded(values, 0.02)
    assert found.difference.ci95 == pytest.approx(0.01553, abs=5e-6)
    assert found.alone == found.difference
    assert concluded(values, 0.02, comparisons=3).alone.ci95 == pytest.approx(0.01553, abs=5e-6)


def test_the_simultaneous_interval_agrees_with_scipy() -> None:
    values, m = [0.012, 0.019, 0.011, 0.025], 5
    found = concluded(values, 0.001, m)
    t = stats.t.ppf(0.5 + 0.95 ** (1 / m) / 2, 3)
    assert found.difference.ci95 == pytest.approx(t * np.std(values, ddof=1) / 2, rel=1e-12)
    p = stats.ttest_1samp(values, 0).pvalue
    assert (found.p, found.p_adjusted) == pytest.approx((p, 1 - (1 - p) ** m), rel=1e-9)


@pytest.mark.parametrize(
    ("values", "smallest", "word"),
    [
        ([-0.1, -0.11, -0.12], 0.01, "better"),
        ([0.1, 0.11, 0.12], 0.01, "worse"),
        ([0.001, -0.001, 0.0], 0.01, "equivalent"),
        ([-0.1, -0.11, -0.12], 0.2, "equivalent"),  # a difference, too small to matter
        ([0.1, -0.1, 0.05], 0.01, "undecided"),
        ([0.0, 0.0], 0.01, "equivalent"),
        ([0.02, 0.02], 0.01, "worse"),
        ([-0.5], 0.01, "undecided"),
        ([], 0.01, "undecided"),
    ],
)
def test_the_four_words(values: list[float], smallest: float, word: str) -> None:
    assert concluded(values, smallest).conclusion == word


def test_one_seed_and_no_seed_say_so() -> None:
    one, none = concluded([-0.5], 0.01), concluded([], 0.01)
    assert (one.difference.mean, one.difference.ci95, one.p_adjusted, one.further_seeds) == (
        -0.5, None, None, None,
    )  # fmt: skip
    assert "one seed" in one.why
    assert "no seed in common" in none.why


def test_a_doubt_decides_nothing() -> None:
    found = conclude(paired({0: 1.0, 1: 1.1}, {0: 0.5, 1: 0.6}), 0.01, doubt="nothing was learned")
    assert (found.conclusion, found.why, found.further_seeds) == ("undecided", "nothing was learned", None)


@settings(deadline=None)
@given(differences, smallest_values, families)
def test_swapping_variant_and_baseline_swaps_better_and_worse(
    values: list[float], smallest: float, m: int
) -> None:
    forward, backward = concluded(values, smallest, m), concluded(values, smallest, m, sign=-1.0)
    assert backward.conclusion == OPPOSITE[forward.conclusion]
    assert backward.p_adjusted == forward.p_adjusted
    assert backward.further_seeds == forward.further_seeds


@settings(deadline=None)
@given(differences, smallest_values, families)
def test_an_interval_excludes_0_exactly_where_its_p_value_is_small(
    values: list[float], smallest: float, m: int
) -> None:
    found = concluded(values, smallest, m)
    for summary, p in ((found.difference, found.p_adjusted), (found.alone, found.p)):
        assume(abs(p - 0.05) > 1e-6)
        assert (summary.low > 0 or summary.high < 0) == (p < 0.05)


@settings(deadline=None)
@given(differences, st.integers(1, 12), st.integers(0, 5))
def test_more_comparisons_never_narrow_an_interval(values: list[float], m: int, more: int) -> None:
    few, many = concluded(values, 0.01, m), concluded(values, 0.01, m + more)
    assert many.difference.low <= few.difference.low <= few.alone.low
    assert few.alone.high <= few.difference.high <= many.difference.high
    assert many.p_adjusted >= few.p_adjusted >= few.p


@settings(deadline=None)
@given(
    st.floats(-3, 3), st.floats(1e-3, 3), st.integers(2, 20), st.integers(1, 50), smallest_values, families
)
def test_more_seeds_of_the_same_spread_never_undo_a_decision(
    mean: float, std: float, n: int, more: int, smallest: float, m: int
) -> None:
    def word(n: int) -> str:
        found = simultaneous(Summary(n, mean, std, half_width(std, n)), m)
        edges = (found.low, found.high, found.low + smallest, found.high - smallest)
        assume(all(abs(edge) > 1e-9 for edge in edges))
        return concluded(of(mean, std, n), smallest, m).conclusion

    before, after = word(n), word(n + more)
    if before != "undecided":
        assert after != "undecided"
        assert {before, after} != {"better", "worse"}


@settings(deadline=None)
@given(differences, smallest_values, families, st.sampled_from([2.0**-10, 0.5, 4.0, 2.0**12]))
def test_a_change_of_unit_changes_nothing(values: list[float], smallest: float, m: int, scale: float) -> None:
    before, after = concluded(values, smallest, m), concluded(values, scale * smallest, m, sign=scale)
    assert (after.conclusion, after.further_seeds) == (before.conclusion, before.further_seeds)


@settings(deadline=None)
@given(differences, smallest_values, families, st.sampled_from([0, 1]))
def test_the_further_seeds_decide_at_their_end_of_the_spread_and_one_fewer_would_not(
    values: list[float], smallest: float, m: int, end: int
) -> None:
    found = concluded(values, smallest, m)
    if found.conclusion != "undecided":
        assert found.further_seeds is None
        return
    seen, further = len(values), found.further_seeds and found.further_seeds[end]
    assume(further is not None)
    mean = found.difference.mean
    std = found.difference.std * math.sqrt((seen - 1) / stats.chi2.ppf((0.9, 0.1)[end], seen - 1))
    for n, open_ in ((seen + further, False), (seen + further - 1, True))[: 2 if further > 1 else 1]:
        half = stats.t.ppf(0.5 + 0.95 ** (1 / m) / 2, n - 1) * std / math.sqrt(n)
        low, high = mean - half, mean + half
        edges = (low, high, low + smallest, high - smallest)
        assume(all(abs(edge) > 1e-9 for edge in edges))
        outside = low < -smallest or high > smallest
        assert (low <= 0 <= high and outside) == open_


def test_further_seeds_by_hand() -> None:
    # Of 5 seeds χ²_4 is 1.0636 and 7.7794 at 10% and 90%: a std of 1 is 0.717 to 1.939.
    # mean 0, smallest 1: t·0.717/√n <= 1 holds at the next n already; t·1.939/√n <= 1 first holds for n = 17
    # (t = 2.120 < √17/1.939 = 2.126; t_15 = 2.131 > √16/1.939)
    assert further_seeds(Summary(5, 0.0, 1.0, None), 1.0) == (1, 12)
    assert further_seeds(Summary(1, 0.3, None, None), 1.0) is None
    assert further_seeds(Summary(3, 0.0, 1.0, None), 0.0) is None


def test_two_seeds_give_a_wide_range_or_one_end_of_it() -> None:
    low, high = further_seeds(Summary(2, 0.0, 1.0, None), 1.0)
    assert low <= 5 < 50 * low < high
    assert further_seeds(Summary(2, 0.0, 200.0, None), 1.0)[1] is None
    found = concluded([0.3, -0.2], 0.01)
    assert "if the mean stays, between" in found.why
    assert "about" not in found.why
    assert in_words((3, None)) == "3 or more further seeds"
    assert (in_words((1, 1)), in_words((2, 2))) == ("1 further seed", "2 further seeds")


@settings(deadline=None)
@given(differences, smallest_values, families)
def test_no_text_takes_an_interval_that_covers_0_for_equality(
    values: list[float], smallest: float, m: int
) -> None:
    found = concluded(values, smallest, m)
    text = f"{found.conclusion} {found.why}"
    assert not any(word in text for word in ("no difference", "same", "equal "))
    if "equivalent" in text:
        assert -smallest <= found.difference.low <= found.difference.high <= smallest


def test_simultaneous_intervals_cover_all_differences_of_variants_that_share_a_baseline() -> None:
    rng = np.random.default_rng(0)
    trials, seeds, m = 4000, 4, 5
    spread = np.array([0.2, 1.0, 1.0, 3.0, 10.0])
    base = rng.standard_normal((trials, seeds, 1))
    runs = spread * rng.standard_normal((trials, seeds, m)) - base
    half = runs.std(1, ddof=1) / 2 * (simultaneous(Summary(seeds, 0.0, 1.0, 1.0), m).ci95 * 2)
    covered = (np.abs(runs.mean(1)) <= half).all(-1).mean()
    assert 0.945 < covered < 0.985


def test_max_t_keeps_what_there_is_to_keep() -> None:
    assert max_t(None, 3) is None
    assert max_t(1.0, 3) == 1.0
    assert max_t(0.0, 3) == 0.0
    assert max_t(0.02, 1) == 0.02
    assert max_t(1e-18, 4) == pytest.approx(4e-18)
    assert simultaneous(summarize([1.0]), 4) == summarize([1.0])


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0.5%", 0.01), ("5 %", 0.1), (0.02, 0.02), (1, 1.0), ("1e-3", 0.001), ("1e1%", 0.2)],
)
def test_the_smallest_difference_is_a_share_or_a_number(value: float | str, expected: float) -> None:
    assert smallest_difference(value, 2.0) == pytest.approx(expected)
    assert smallest_difference(value, -2.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "value", [0, -1, "0%", "-1%", "half", "", "%", None, True, math.nan, math.inf, [0.1], {"a": 1}, "inf%"]
)
def test_another_smallest_difference_is_refused(value: object) -> None:
    with pytest.raises(HeadwiseError, match="smallest_difference is"):
        smallest_difference(value, 2.0)
