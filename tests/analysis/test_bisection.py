"""Bisection over noisy commits: right answers, no run too many, and a pure function of what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from headwise.analysis.bisection import Found, next_step
from headwise.bench.bisect import row
from headwise.errors import HeadwiseError

Oracle = Callable[[int, int], float | None]


def drive(
    oracle: Oracle, commits: int, *, together: bool = True, **options: Any
) -> tuple[Found, dict[tuple[int, int], float | None]]:
    """Measure what is asked for, all of a step or the first of it alone."""
    measured: dict[tuple[int, int], float | None] = {}
    while (step := next_step(measured, commits, **options)).found is None:
        assert step.measure
        assert not set(step.measure) & set(measured)
        for index, seed in step.measure if together else step.measure[:1]:
            assert 0 <= index < commits
            measured[index, seed] = oracle(index, seed)
    assert step.measure == ()
    return step.found, measured


def noisy(levels: Mapping[int, float] | np.ndarray, seed: int = 0) -> Oracle:
    noise = np.random.default_rng(seed).standard_normal((64, 64))
    return lambda index, run: float(levels[index] + noise[index, run])


def test_a_regression_of_3_std_is_found_in_19_of_20_histories() -> None:
    found = row("regression of 3 std", 0.0, trials=40, commits=64)
    assert found["found"] >= 0.95
    assert found["median_runs"] < 64


def test_no_regression_is_said() -> None:
    found = row("no regression", 0.0, trials=20, commits=8)
    assert found["says_none"] >= 0.9
    answer, measured = drive(noisy(np.zeros(8)), 8, most_seeds=5)
    assert (answer.first_bad, answer.candidates, answer.runs) == (None, (), len(measured))
    assert "no regression beyond the noise: after 5 seeds" in answer.why
    better, _ = drive(noisy(-20.0 * (np.arange(8) > 3)), 8)
    assert "better than the good end" in better.why


def test_a_regression_too_small_to_matter_ends_the_search_early() -> None:
    answer, measured = drive(noisy(np.zeros(8)), 8, smallest=30.0)
    assert (answer.candidates, len(measured)) == ((), 6)
    assert "no regression that matters" in answer.why


@pytest.mark.parametrize("first", [1, 7, 40, 63])
def test_a_large_regression_takes_the_fewest_runs_whatever_the_sign_and_the_order(first: int) -> None:
    levels = 1e4 * (np.arange(64) >= first)
    answer, measured = drive(noisy(levels), 64)
    assert answer.first_bad == first
    assert answer.runs == len(measured) <= 6 + 2 * 6  # three seeds of both ends, then one or two a commit
    assert f"commit {first} is the first worse commit" in answer.why
    assert drive(noisy(levels), 64, together=False)[0] == answer
    oracle = noisy(levels)
    flipped, _ = drive(lambda i, s: -oracle(i, s), 64, worse="lower")
    assert (flipped.first_bad, flipped.runs) == (first, answer.runs)


def test_it_goes_on_from_any_part_of_its_measurements() -> None:
    oracle = noisy(3.0 * (np.arange(64) >= 23))
    answer, measured = drive(oracle, 64)
    kept = list(measured)
    for count in range(0, len(kept), 5):
        step = next_step({pair: measured[pair] for pair in kept[:count]}, 64)
        assert set(step.measure) <= set(measured) - set(kept[:count])
    assert next_step(dict(reversed(measured.items())), 64).found == answer
    assert next_step(measured | {(50, 9): -1e9}, 64).found == answer  # not asked for


def test_commits_that_cannot_run_are_skipped_and_leave_a_range() -> None:
    levels = 100.0 * (np.arange(16) >= 6)
    dead = {5: "does not build", 6: "does not build", 12: "does not build"}
    answer, measured = drive(noisy(levels), 16, unrunnable=dead)
    assert (answer.first_bad, answer.candidates) == (None, (5, 6, 7))
    assert not {index for index, _ in measured} & set(dead)
    assert "one of 5 to 7" in answer.why
    assert "5 (does not build)" in answer.why

    def diverges(index: int, seed: int) -> float | None:
        return {7: None, 8: math.nan}.get(index, noisy(levels)(index, seed))

    answer, _ = drive(diverges, 16)
    assert answer.first_bad == 6
    assert set(answer.skipped) == {7, 8}


def test_a_commit_between_the_levels_is_not_forced_onto_one() -> None:
    levels = np.array([0.0, 0.0, 10.0, 20.0, 20.0])
    answer, _ = drive(noisy(levels), 5, most_seeds=6)
    assert answer.candidates == (2, 3)
    assert "between the levels of both ends" in answer.skipped[2]


def test_one_change_from_good_to_bad_is_found_where_there_are_several() -> None:
    index = np.arange(32)
    levels = 50.0 * (((index >= 5) & (index < 12)) | (index >= 20))
    answer, _ = drive(noisy(levels), 32)
    assert answer.first_bad in (5, 20)
    recovered, _ = drive(noisy(50.0 * ((index >= 5) & (index < 12))), 32)
    assert recovered.candidates == ()


def test_one_run_settles_a_commit_that_computes_the_same() -> None:
    noise = np.random.default_rng(1).standard_normal((2, 64))

    def oracle(index: int, seed: int) -> float:
        return float(noise[int(index >= 40), seed] + 4.0 * (index >= 40))

    answer, measured = drive(oracle, 64)
    assert answer.first_bad == 40
    ends = sum(index in (0, 63) for index, _ in measured)
    assert len(measured) - ends == 6
    unchanged, measured = drive(lambda i, s: float(noise[0, s]), 64)
    assert (unchanged.candidates, len(measured)) == ((), 2)
    assert "exactly the same value" in unchanged.why


def test_seeds_that_change_nothing_show_no_noise() -> None:
    fixed = [1.0123456789, 2.0123456789]
    answer, _ = drive(lambda i, s: fixed[int(i > 3)], 8)
    assert answer.candidates == ()
    assert "the noise cannot be measured" in answer.why
    rounded, measured = drive(lambda i, s: (0.1 * s + 0.3) if i > 3 else 0.1 * s, 8)
    assert rounded.first_bad == 4
    assert (0, 15) in measured  # equal differences show no spread before the last seed
    coarse, _ = drive(lambda i, s: float(i > 3) + s, 8)
    assert coarse.first_bad == 4


def test_ends_without_values_are_said() -> None:
    answer, measured = drive(lambda i, s: None, 4, most_seeds=3)
    assert "0 of 3 seeds gave a value" in answer.why
    assert len(measured) == 6
    holes, _ = drive(lambda i, s: None if (i, s) == (0, 1) else noisy([0.0, 0.0, 90.0, 90.0])(i, s), 4)
    assert holes.first_bad == 2


@pytest.mark.parametrize(
    ("commits", "options", "part"),
    [
        (1, {}, "1 commits"),
        (4, {"most_seeds": 2}, "at least 3 seeds"),
        (4, {"worse": "bigger"}, "worse"),
        (4, {"smallest": math.nan}, "smallest"),
        (4, {"unrunnable": {3: "does not build"}}, "bad commit cannot run: does not build"),
    ],
)
def test_what_cannot_be_bisected_is_refused(commits: int, options: dict[str, Any], part: str) -> None:
    with pytest.raises(HeadwiseError, match=part):
        next_step({}, commits, **options)
