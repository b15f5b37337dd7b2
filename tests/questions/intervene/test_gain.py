from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import HeadwiseError
from headwise.questions.intervene import gain
from headwise.questions.intervene.sweep import (
    Sweep,
    monotonic,
    parse_sweeps,
    sample_rows,
    sweep_rows,
    with_samples,
)

# The sweep that the query-scaling study published for layer 12, head 15 of an 8B model, and its gain
# (github.com/ajayspatil7/oculi, results/intervention and experiments/exp2_gain).
PUBLISHED = """scale,mean_entropy,mean_max_attn,mean_k_eff,std_entropy,std_max_attn,std_k_eff,\
n_tokens,layer,head,head_type
0.5,5.113076686859131,0.03156476467847824,194.1431427001953,0.934,0.0534,112.3,510,12,15,control
0.75,4.946809768676758,0.051509782671928406,172.939208984375,0.961,0.0790,101.3,510,12,15,control
1.0,4.732486248016357,0.07865509390830994,151.39804077148438,1.012,0.1120,90.6,510,12,15,control
1.25,4.481868267059326,0.11174210160970688,130.17059326171875,1.082,0.1471,80.5,510,12,15,control
1.5,4.210667610168457,0.14864161610603333,110.0941162109375,1.154,0.1790,71.3,510,12,15,control
"""
PUBLISHED_GAIN = {
    "gain": 0.10396193577777608,
    "std_error": 0.01692520483393498,
    "r_squared": 0.9263432821438984,
}
PUBLISHED_GAIN |= {"gain_entropy": -0.8045083802411997, "gain_k_eff": -75.98501171220039}


def parse(text: str) -> list[Sweep]:
    return parse_sweeps(list(csv.DictReader(io.StringIO(text))), "sweep.csv")


def head(
    slope: float, std_error: float = 0.01, per_sample: np.ndarray | None = None, **changed: object
) -> gain.Gain:
    half = 3.182 * std_error
    fields = {"layer": 0, "head": 0, "head_type": "target", "gain": slope, "intercept": 0.0}
    fields |= {"std_error": std_error, "low": slope - half, "high": slope + half, "r_squared": 0.9}
    fields |= {
        "gain_entropy": -1.0,
        "gain_k_eff": -1.0,
        "monotonic": True,
        "n_scales": 5,
        "per_sample": per_sample,
    }
    return gain.Gain(**(fields | changed))  # type: ignore[arg-type]


def test_the_published_sweep_has_its_published_gain() -> None:
    (sweep,) = parse(PUBLISHED)
    found = gain.gain_of(sweep)
    assert (found.layer, found.head, found.head_type, sweep.n_tokens) == (12, 15, "control", 510)
    for name, value in PUBLISHED_GAIN.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6)
    assert found.monotonic
    assert found.high - found.gain == pytest.approx(3.182446 * found.std_error, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 9))
def test_fit_equals_scipy_for_every_series_at_once(seed: int, n: int) -> None:
    from scipy.stats import linregress

    rng = np.random.default_rng(seed)
    scales = np.cumsum(rng.uniform(0.1, 1, n))
    values = rng.normal(size=(n, 2, 3))
    found = gain.fit(scales, values)
    for index in np.ndindex(2, 3):
        expected = linregress(np.log(scales), values[:, *index])
        assert found.slope[index] == pytest.approx(expected.slope, abs=1e-9)
        assert found.intercept[index] == pytest.approx(expected.intercept, abs=1e-9)
        assert found.std_error[index] == pytest.approx(expected.stderr, abs=1e-9)
        assert found.r_squared[index] == pytest.approx(expected.rvalue**2, abs=1e-9)


def test_a_straight_response_has_no_error_and_two_scales_have_no_interval() -> None:
    exact = gain.fit((0.5, 1, 2), 0.3 + 0.2 * np.log([0.5, 1, 2]))
    assert exact.slope == pytest.approx(0.2)
    assert exact.half_width == pytest.approx(0, abs=1e-12)
    assert math.isnan(gain.fit((0.5, 1), np.array([1.0, 2.0])).half_width)
    for scales in ((1.0, 1.0), (0.0, 1.0)):
        with pytest.raises(ValueError, match="two different scales above 0"):
            gain.fit(scales, np.array([1.0, 2.0]))


@settings(max_examples=60, deadline=None)
@given(st.floats(-5, 5), st.floats(0.5, 5), st.floats(1e-4, 0.1), st.floats(1e-4, 0.1), st.floats(-0.9, 0.9))
def test_fieller_holds_the_ratio_and_its_ends_solve_the_equation(
    a: float, b: float, sa: float, sb: float, correlation: float
) -> None:
    cov = correlation * sa * sb
    t = 2.0
    low, high = gain.fieller(a, b, np.array([[sa**2, cov], [cov, sb**2]]), t)
    assert low <= a / b <= high
    for end in (low, high):
        assert (a - end * b) ** 2 == pytest.approx(
            t**2 * (sa**2 - 2 * end * cov + end**2 * sb**2), rel=1e-6, abs=1e-12
        )


def test_fieller_covers_at_its_level() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        a, b = rng.normal(3, 1, 12), rng.normal(2, 0.7, 12)
        low, high = gain.fieller(a.mean(), b.mean(), np.cov(a, b) / 12, gain.t_quantile(12))
        hits += low <= 1.5 <= high
    assert 0.92 <= hits / 400 <= 0.98


READINGS = [
    (head(0.30, 0.001), head(0.10, 0.001), "strong evidence"),
    (head(0.17, 0.001), head(0.10, 0.001), "the target is more sensitive"),
    (head(0.10, 0.001), head(0.10, 0.001), "no functional distinction.*contains 1.0"),
    (head(0.12, 0.001), head(0.10, 0.001), "no functional distinction.*between 1.0 and 1.5"),
    (head(0.05, 0.001), head(0.10, 0.001), "less sensitive"),
    (head(0.15, 0.010), head(0.10, 0.010), "INCONCLUSIVE: the interval spans 1.5"),
    (head(0.15, 0.010), head(0.01, 0.010), "INCONCLUSIVE: the control's gain cannot be told from 0"),
]


@pytest.mark.parametrize(("target", "control", "words"), READINGS)
def test_the_reading_follows_the_interval(target: gain.Gain, control: gain.Gain, words: str) -> None:
    import re

    ratio = gain.gain_ratio(target, control)
    assert ratio.over == "scales"
    assert re.search(words, gain.reading(ratio))


def test_samples_that_both_heads_saw_narrow_the_interval() -> None:
    shared = np.random.default_rng(0).normal(0, 0.02, 64)
    target, control = 0.2 + 2 * shared, 0.1 + shared
    ratio = gain.gain_ratio(head(0.2, 0.05, target), head(0.1, 0.05, control))
    assert ratio.over == "64 samples"
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


def test_flat_and_the_failure_rule() -> None:
    assert gain.flat(head(0.01, 0.01), median=0.1)  # the interval contains 0
    assert gain.flat(head(0.004, 0.0001), median=0.1)  # below 5% of the median
    assert not gain.flat(head(0.006, 0.0001), median=0.1)
    steep, still = head(0.1), head(0.0, 0.0001)
    assert "decides nothing" in gain.rule_applied(steep, steep, 0.1)
    assert "finds no failure" in gain.rule_applied(steep, still, 0.1)
    assert "epiphenomenal" in gain.rule_applied(head(0.1, monotonic=False), still, 0.1)


def test_monotonic_names_the_measure_that_turns() -> None:
    (sweep,) = parse(PUBLISHED.replace("0.07865509390830994", "0.04"))
    assert monotonic(sweep) == {"entropy": True, "max_weight": False, "k_eff": True}


def test_rows_come_back_as_they_were() -> None:
    (sweep,) = parse(PUBLISHED)
    with_effects = Sweep(
        **{
            **vars(sweep),
            "delta_loss": np.arange(5) / 7,
            "delta_loss_ci95": np.ones(5),
            "kl": np.array([0.5, 0.1, 0, 0.1, 0.4]),
        }
    )
    rows = [{k: str(v) for k, v in row.items()} for s in (sweep, with_effects) for row in sweep_rows(s)]
    assert list(rows[0])[:11] == PUBLISHED.splitlines()[0].split(",")
    for original, again in zip(
        (sweep, with_effects),
        (*parse_sweeps(rows[:5], "a"), *parse_sweeps(rows[5:], "b")),
        strict=True,
    ):
        np.testing.assert_equal(vars(again), vars(original))


def test_samples_come_back_to_the_sweeps_they_are_of() -> None:
    (first,) = parse(PUBLISHED)
    samples = np.random.default_rng(0).random((5, 3))
    kept = replace(first, samples=samples, samples_of="abc")
    other = replace(first, head=1)
    rows = [{k: str(v) for k, v in row.items()} for row in sample_rows(kept)]
    again, without = with_samples([first, other], rows, "samples.csv")
    np.testing.assert_array_equal(again.samples, samples)
    assert again.samples_of == "abc"
    assert without.samples is None
    assert with_samples([first], rows[:-1], "samples.csv")[0].samples is None
    assert gain.gain_of(again).per_sample == pytest.approx(gain.fit(first.scales, samples).slope)


def test_gains_over_other_samples_are_not_paired() -> None:
    per_sample = np.array([0.1, 0.2, 0.3])
    one, other = head(0.2, 0.01, per_sample, samples_of="a"), head(0.1, 0.01, per_sample, samples_of="b")
    assert gain.gain_ratio(one, other).over == "scales"
    assert gain.gain_ratio(one, one).over == "3 samples"


BROKEN = {
    "empty": ("scale,layer\n", "holds no rows"),
    "column": ("scale,layer,mean_max_attn\n1,2,3\n", "no column 'head'"),
    "number": (PUBLISHED.replace("0.03156476467847824", "high"), "holds 'high', which is not a number"),
    "one scale": ("\n".join(PUBLISHED.splitlines()[:2]), "layer 12 head 15 has scales 0.5;"),
    "twice": (PUBLISHED + PUBLISHED.splitlines()[1], "has scales 0.5, 0.5, 0.75"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_sweep_is_named(case: str) -> None:
    text, message = BROKEN[case]
    with pytest.raises(HeadwiseError, match=message):
        parse(text)
