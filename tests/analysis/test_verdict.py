"""Every way to a verdict, with numbers on either side of its threshold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.analysis.importance import Signal
from headwise.analysis.statistics import Summary
from headwise.analysis.verdict import CRITERIA, Evidence, check_criteria, judge
from headwise.errors import HeadwiseError


def interval(mean: float, ci95: float = 0.001) -> Summary:
    return Summary(3, mean, ci95 / 2.48, ci95)


GOOD = Evidence(loss=interval(0.01), memory=interval(-0.30), nonfinite_share=0.0, spike_share=0.0, started=3)


def test_go_by_memory() -> None:
    verdict = judge(GOOD)
    assert (verdict.verdict, verdict.decided_by) == ("GO", "memory")
    assert "-30.0%" in verdict.text
    assert "+1.0%" in verdict.text


def test_no_go_when_memory_is_not_lower() -> None:
    verdict = judge(replace(GOOD, memory=interval(-0.10)))
    assert verdict.verdict == "NO-GO"
    assert "head importance was not measured here" in verdict.text


def test_no_go_when_the_loss_is_worse_whatever_the_memory() -> None:
    verdict = judge(replace(GOOD, loss=interval(0.08)))
    assert (verdict.verdict, verdict.decided_by) == ("NO-GO", "loss")


@pytest.mark.parametrize(
    "change",
    [{"loss": interval(0.04, 0.02)}, {"memory": interval(-0.2, 0.05)}, {"loss": Summary(1, 0.0, None, None)}],
)  # fmt: skip
def test_inconclusive_where_an_interval_spans_its_threshold(change: dict) -> None:
    assert judge(replace(GOOD, **change)).verdict == "INCONCLUSIVE"


def test_spanning_loss_cannot_save_a_rule_that_fails() -> None:
    verdict = judge(replace(GOOD, loss=interval(0.04, 0.02), memory=interval(0.1)))
    assert verdict.verdict == "NO-GO"


def test_memory_is_not_evaluated_on_cpu_and_says_so() -> None:
    verdict = judge(replace(GOOD, on_cpu=True, memory=interval(-0.01)))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "peak memory of the process -1.0%" in verdict.text
    assert "not evaluated on CPU; runs on a GPU would evaluate it" in verdict.text
    assert judge(replace(GOOD, on_cpu=True, loss=interval(0.2))).verdict == "NO-GO"


def test_the_memory_of_a_process_holds_the_libraries_so_it_can_prove_a_saving_and_hardly_refute_one() -> None:
    saved = judge(replace(GOOD, on_cpu=True))
    assert (saved.verdict, saved.decided_by) == ("GO", "memory")
    assert "of the process" in saved.text
    more = judge(replace(GOOD, on_cpu=True, memory=interval(0.05)))
    assert (more.verdict, more.decided_by) == ("NO-GO", "memory")
    twice = replace(GOOD, on_cpu=True, memory=interval(0.0), length_factor=2.0)
    assert judge(twice).verdict == "INCONCLUSIVE"
    assert judge(replace(twice, length_factor=1.5)).verdict == "NO-GO"


def test_go_by_length() -> None:
    twice = replace(GOOD, memory=interval(0.005), length_factor=2.0)
    assert (judge(twice).verdict, judge(twice).decided_by) == ("GO", "length")
    assert judge(replace(twice, length_factor=1.9)).verdict == "NO-GO"
    assert judge(replace(twice, memory=interval(0.3))).verdict == "NO-GO"


def test_go_by_entropy_only_where_the_baseline_does_not_predict() -> None:
    strong, weak = Signal({0: -0.7, 1: -0.8}, -0.75, -0.8, -0.7, 0.01), Signal({0: 0.1}, 0.1, -0.5, 0.6, 0.4)
    base = replace(
        GOOD, memory=None, signal=strong, signal_p=0.01, baseline_signal=weak, baseline_signal_p=0.4
    )
    assert (judge(base).verdict, judge(base).decided_by) == ("GO", "entropy_signal")
    assert "r = -0.75 [-0.80, -0.70], corrected p = 0.01" in judge(base).text
    assert judge(replace(base, baseline_signal_p=0.01)).verdict == "NO-GO"
    assert judge(replace(base, signal_p=0.06)).verdict == "NO-GO"
    one_seed = judge(replace(base, signal=Signal({0: -0.7}, -0.7, None, None, None), signal_p=None))
    assert one_seed.verdict == "INCONCLUSIVE"
    assert "two seeds or more would evaluate it" in one_seed.text


@pytest.mark.parametrize(
    ("difference", "compute", "verdict"),
    [
        (interval(-0.05, 0.01), 1.0, "GO"),
        (interval(-0.05, 0.01), 0.5, "GO"),
        (interval(-0.05, 0.045), 1.0, "INCONCLUSIVE"),
        (interval(-0.005, 0.001), 1.0, "NO-GO"),  # lower, by less than what matters
        (interval(-0.05, 0.01), 1.1, "INCONCLUSIVE"),  # more compute: the criterion cannot be evaluated
        (interval(-0.05, 0.01), None, "INCONCLUSIVE"),
        (interval(0.02, 0.001), 1.1, "NO-GO"),  # not lower with more compute: with less even less so
        (interval(0.02, 0.001), 0.5, "INCONCLUSIVE"),  # half the compute: more may lower it
        (interval(-0.005, 0.001), 0.5, "INCONCLUSIVE"),
        (Summary(1, -0.5, None, None), 1.0, "INCONCLUSIVE"),
    ],
)
def test_quality_needs_a_difference_that_matters_at_equal_compute(
    difference: Summary, compute: float | None, verdict: str
) -> None:
    evidence = replace(GOOD, loss=interval(-0.01), difference=difference, smallest=0.01, compute=compute)
    found = judge(evidence, ["quality"])
    assert found.verdict == verdict
    evaluated = found.decided_by == "quality"
    assert evaluated is (compute == 1.0 or (compute, verdict) in [(0.5, "GO"), (1.1, "NO-GO")])
    assert evaluated is not ("would evaluate quality" in found.text)


def test_only_the_criteria_of_the_study_earn_a_go() -> None:
    evidence = replace(GOOD, difference=interval(0.0), smallest=0.01, compute=1.0)
    assert judge(evidence).verdict == "GO"
    assert judge(evidence, ["quality"]).verdict == "NO-GO"
    assert judge(evidence, ["quality", "memory"]).decided_by == "memory"
    assert [rule.name for rule in judge(evidence, list(CRITERIA)).rules[2:]] == list(CRITERIA)


@pytest.mark.parametrize("name", list(CRITERIA))
def test_a_criterion_that_cannot_be_evaluated_names_what_would(name: str) -> None:
    found = judge(Evidence(loss=interval(0.0), spike_share=0.0), [name])
    assert found.verdict == "INCONCLUSIVE"
    assert "would evaluate" in found.text


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ([], "give a list of memory, length"),
        ("memory", "give a list"),
        (None, "give a list"),
        ({"memory": 1}, "give a list"),
        (["memroy"], "did you mean 'memory'"),
        ([["memory"]], "is not known"),
        (["memory", "memory"], "twice"),
    ],
)
def test_criteria_are_checked(criteria: object, message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        check_criteria(criteria)


@pytest.mark.parametrize("change", [{"nonfinite_share": 0.002}, {"spike_share": 0.011}, {"diverged": 1}])
def test_unstable_is_no_go_even_with_memory_saved(change: dict) -> None:
    verdict = judge(replace(GOOD, **change))
    assert (verdict.verdict, verdict.decided_by) == ("NO-GO", "stability")


def test_shares_at_the_limit_are_stable() -> None:
    assert judge(replace(GOOD, nonfinite_share=0.001, spike_share=0.01)).verdict == "GO"


def test_nothing_learned_gives_no_verdict() -> None:
    verdict = judge(replace(GOOD, learned=False))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "nothing was learned" in verdict.text


@pytest.mark.parametrize("loss", [interval(0.0), interval(0.2)])
def test_losses_that_cannot_be_compared_give_no_verdict_by_any_criterion(loss: Summary) -> None:
    verdict = judge(replace(GOOD, loss=loss, doubt="different seeds of b end on one loss"), list(CRITERIA))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "different seeds of b" in verdict.text
    assert judge(replace(GOOD, doubt="so they say", diverged=1)).verdict == "NO-GO"


def test_a_verdict_names_the_loss_that_was_compared() -> None:
    verdict = judge(replace(GOOD, metric="training loss, smoothed"))
    assert "training loss, smoothed +1.0%" in verdict.text
    assert "validation loss" not in verdict.text


def test_no_common_seed() -> None:
    verdict = judge(replace(GOOD, loss=Summary(0, None, None, None)))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "no common seed" in verdict.text


@settings(deadline=None)
@given(st.floats(-0.5, 0.5), st.floats(0, 0.3), st.floats(-0.9, 0.9), st.floats(0, 0.3))
def test_a_narrower_interval_never_swaps_go_and_no_go(
    loss: float, loss_width: float, memory: float, memory_width: float
) -> None:
    wide = replace(GOOD, loss=interval(loss, loss_width), memory=interval(memory, memory_width))
    narrow = replace(GOOD, loss=interval(loss, 0.0), memory=interval(memory, 0.0))
    before, after = judge(wide).verdict, judge(narrow).verdict
    assert after != "INCONCLUSIVE"
    assert before in ("INCONCLUSIVE", after)
