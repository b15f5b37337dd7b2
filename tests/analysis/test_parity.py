from __future__ import annotations

import math

import pytest

from headwise.analysis.parity import crossing, parity

HALVES = {1.0: 2.0, 0.5: 2.1, 0.25: 2.3, 0.125: 2.7}


def test_parity_is_interpolated_in_the_logarithm_of_the_share() -> None:
    assert crossing(HALVES, 2.1) == 0.5
    assert crossing(HALVES, 2.2) == pytest.approx(math.sqrt(0.5 * 0.25))
    assert crossing(HALVES, 2.6) == pytest.approx(0.25 * 0.5**0.75)
    assert crossing(HALVES, 2.7) == 0.125
    assert crossing(HALVES, 1.99) is None


def test_the_smallest_share_counts_where_a_curve_is_not_monotone() -> None:
    assert crossing({1.0: 2.3, 0.5: 2.0, 0.25: 2.2}, 2.1) == pytest.approx(math.sqrt(0.5 * 0.25))


def test_seeds_are_paired_and_the_interval_is_students_in_the_logarithm() -> None:
    curves = {seed: {share: loss + seed for share, loss in HALVES.items()} for seed in (1, 2, 3)}
    shares = {1: 0.5, 2: 0.25, 3: 0.25}
    references = {seed: curves[seed][share] for seed, share in shares.items()} | {9: 0.0}
    found = parity(curves, references)
    logs = [math.log(share) for share in shares.values()]
    mean = sum(logs) / 3
    half = 4.302652729749462 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    assert found.share == pytest.approx(math.exp(mean))
    assert (found.low, found.high) == pytest.approx((math.exp(mean - half), math.exp(mean + half)))
    text = found.text("flash", 0.125)
    assert text == (
        "parity with flash at 0.31 of the context (3.2x less memory; "
        f"95% interval {1 / found.high:.1f}x–{1 / found.low:.1f}x)"  # type: ignore[operator]
    )


def test_one_seed_has_no_interval_and_the_sentence_says_so() -> None:
    found = parity({0: HALVES}, {0: 2.1})
    assert found.low is None
    assert "one seed, no interval" in found.text("flash", 0.125)


def test_no_parity_and_parity_in_some_seeds_are_said_plainly() -> None:
    never = parity({0: HALVES, 1: HALVES}, {0: 1.9, 1: 1.8})
    assert never.text("flash", 0.125).startswith("no parity with flash at any budget measured; ")
    assert never.excess == pytest.approx(0.15)
    assert "+0.1500 nats" in never.text("flash", 0.125)
    some = parity({0: HALVES, 1: HALVES}, {0: 1.9, 1: 2.1})
    assert some.share is None
    assert "1 of 2 seeds only" in some.text("flash", 0.125)
    assert "no seed in common" in parity({0: HALVES}, {1: 2.1}).text("flash", 0.125)


def test_parity_at_the_smallest_share_measured_is_a_bound() -> None:
    found = parity({0: HALVES, 1: HALVES}, {0: 3.0, 1: 2.1})
    assert found.at_most
    assert found.low is None
    assert "or less (at least 4.0x less memory" in found.text("flash", 0.125)
