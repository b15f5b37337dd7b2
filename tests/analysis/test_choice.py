"""Choosing the best of several: separated from the others, or within the noise of seeds."""

from __future__ import annotations

import math
import random

import pytest

from headwise.analysis.choice import Bracket, bracket, noise_of_trials, separation


def test_the_best_is_separated_where_every_interval_of_a_difference_leaves_0_out() -> None:
    base = {seed: 2.0 + 0.1 * seed for seed in range(5)}
    near = {seed: value + 0.001 * (-1) ** seed for seed, value in base.items()}
    far = {seed: value + 0.5 + 0.001 * seed for seed, value in base.items()}
    assert separation("base", {"base": base, "far": far}).doubt is None
    found = separation("base", {"base": base, "far": far, "near": near})
    assert found.close == ("near",)
    assert "not separated from near (difference +0.0002" in str(found.doubt)


@pytest.mark.parametrize(
    ("other", "why"), [({0: 3.0}, "one seed in common"), ({7: 3.0}, "no seed in common")]
)
def test_one_seed_shows_no_noise(other: dict[int, float], why: str) -> None:
    found = separation("a", {"a": {0: 1.0}, "b": other})
    assert found.close == ("b",)
    assert why in str(found.doubt)


def test_one_alone_is_chosen_without_a_doubt() -> None:
    assert separation("a", {"a": {0: 1.0}}).doubt is None


def test_two_trials_of_one_setting_rarely_differ_by_more_than_their_noise() -> None:
    draw = random.Random(1)
    above = 0
    for _ in range(2000):
        noise = noise_of_trials([draw.gauss(2, 0.3) for _ in range(4)], 1)
        assert noise is not None
        above += abs(draw.gauss(2, 0.3) - draw.gauss(2, 0.3)) > noise
    assert 0.035 < above / 2000 < 0.065
    assert noise_of_trials([2.0], 1) is None


@pytest.mark.parametrize(
    ("tried", "best", "where"),
    [
        ([1, 2, 3], 2, Bracket.INSIDE), ([1, 2, 3], 3, Bracket.ABOVE), ([0.1, 0.2, 0.3], 0.1, Bracket.BELOW),
        ([256, 512], 512, Bracket.INSIDE), (["a", "b", "c"], "a", Bracket.INSIDE),
        ([True, False, 2], True, Bracket.INSIDE), ([1, math.pi, 3, 4], 4, Bracket.ABOVE),
    ],
)  # fmt: skip
def test_where_the_best_lies_among_what_was_tried(tried: list, best: object, where: Bracket) -> None:
    assert bracket(tried, best) == where
