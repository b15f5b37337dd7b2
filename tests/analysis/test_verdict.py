"""Every way to a verdict, with numbers on either side of its threshold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.analysis.statistics import Summary
from headwise.analysis.verdict import Evidence, judge


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
    assert "head importance was not measured" in verdict.text


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
    verdict = judge(replace(GOOD, on_cpu=True))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "memory rules are not evaluated on CPU" in verdict.text
    assert judge(replace(GOOD, on_cpu=True, loss=interval(0.2))).verdict == "NO-GO"


def test_go_by_length() -> None:
    twice = replace(GOOD, memory=interval(0.005), length_factor=2.0)
    assert (judge(twice).verdict, judge(twice).decided_by) == ("GO", "length")
    assert judge(replace(twice, length_factor=1.9)).verdict == "NO-GO"
    assert judge(replace(twice, memory=interval(0.3))).verdict == "NO-GO"


def test_go_by_entropy_only_where_flash_does_not_predict() -> None:
    base = replace(GOOD, on_cpu=True, entropy_r=-0.7, entropy_p=0.01, flash_entropy_p=0.4)
    assert (judge(base).verdict, judge(base).decided_by) == ("GO", "entropy")
    assert judge(replace(base, flash_entropy_p=0.01)).verdict == "NO-GO"


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
