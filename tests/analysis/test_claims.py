"""Claims of a section: supported, refuted or not resolved; Holm's steps; what counts as a seed; noise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.analysis.claims import MIRROR, Claim, Decision, Value, decide
from headwise.analysis.noise import noise_floor
from headwise.analysis.sequential import half_width, p_value
from headwise.bench.sequential import null
from headwise.errors import HeadwiseError

values = st.lists(st.floats(-3, 3).map(lambda x: x + math.pi / 1e3), min_size=0, max_size=7)
directions = st.sampled_from(["lower", "higher", "equal"])
smallest_values = st.floats(0.01, 3).map(lambda x: round(x, 3))


def runs(numbers: list[float]) -> list[Value]:
    return [Value(seed, number) for seed, number in enumerate(numbers)]


def noisy(mean: float, n: int, std: float = 1e-3, seed: int = 0) -> list[Value]:
    return runs((mean + std * np.random.default_rng(seed).standard_normal(n)).tolist())


def one(a: list[Value], b: list[Value], direction: str = "lower", smallest: float | str = 0.0) -> Decision:
    return decide([Claim("A", "B", "loss", direction, smallest)], {("A", "loss"): a, ("B", "loss"): b})[0]


@pytest.mark.parametrize(
    ("direction", "smallest", "a", "word"),
    [
        ("lower", 0.0, 0.9, "supported"),
        ("lower", 0.0, 1.1, "refuted"),
        ("lower", 0.05, 0.9, "supported"),
        ("lower", 0.2, 0.9, "refuted"),  # lower, and by less than was claimed
        ("lower", "20%", 0.9, "refuted"),
        ("higher", 0.05, 1.1, "supported"),
        ("higher", 0.0, 0.9, "refuted"),
        ("equal", 0.2, 1.1, "supported"),
        ("equal", 0.05, 1.1, "refuted"),
        ("equal", "1%", 1.0, "supported"),
        ("lower", 0.0, 1.0, "not resolved"),
        ("equal", 0.0001, 1.0, "not resolved"),
        ("lower", 0.1, 0.9, "not resolved"),  # at the edge
    ],
)
def test_what_the_interval_settles(direction: str, smallest: float | str, a: float, word: str) -> None:
    found = one(noisy(a, 6), noisy(1.0, 6, seed=1), direction, smallest)
    assert found.decision == word
    assert (found.p < 0.05) == (word != "not resolved")
    assert (found.further_seeds is None) == (word != "not resolved")


@settings(deadline=None, max_examples=60)
@given(values, values, directions, smallest_values, st.integers(0, 6))
def test_order_of_runs_sides_and_unit_change_nothing(
    a: list[float], b: list[float], direction: str, smallest: float, turn: int
) -> None:
    found = one(runs(a), runs(b), direction, smallest)
    assert one(runs(a)[turn:] + runs(a)[:turn], runs(b)[::-1], direction, smallest) == found
    swapped = decide(
        [Claim("B", "A", "loss", MIRROR[direction], smallest)],
        {("A", "loss"): runs(a), ("B", "loss"): runs(b)},
    )[0]
    flipped = one(runs([-x for x in a]), runs([-x for x in b]), MIRROR[direction], smallest)
    scaled = one(runs([4 * x for x in a]), runs([4 * x for x in b]), direction, 4 * smallest)
    for same in (swapped, flipped, scaled):
        assert (same.decision, same.further_seeds, same.seeds) == (
            found.decision, found.further_seeds, found.seeds,
        )  # fmt: skip
        assert same.p == (None if found.p is None else pytest.approx(found.p, rel=1e-9))


sections = st.lists(st.tuples(st.floats(-1.5, 1.5), directions, st.booleans()), min_size=1, max_size=6)


def section(spec: list[tuple[float, str, bool]]) -> list[Decision]:
    rng = np.random.default_rng(0)
    results = {("base", "loss"): runs(rng.standard_normal(6).tolist())}
    claims = []
    for i, (shift, direction, exploratory) in enumerate(spec):
        results[f"v{i}", "loss"] = runs((10 * shift + rng.standard_normal(6)).tolist())
        claims.append(Claim(f"v{i}", "base", "loss", direction, 2.0, exploratory))
    return decide(claims, results)


@settings(deadline=None, max_examples=40)
@given(sections)
def test_each_interval_settles_its_claim_exactly_where_holm_does(spec: list[tuple[float, str, bool]]) -> None:
    found = section(spec)
    for family in ([d for d in found if not d.claim.exploratory], found):
        p_values = sorted(raw(d) for d in family)
        rejected = next((i for i, p in enumerate(p_values) if p >= 0.05 / (len(p_values) - i)), len(p_values))
        resolved = [raw(d) < [*p_values, 2.0][rejected] for d in family]
        for d, settled in zip(family, resolved, strict=True):
            if d.claim.exploratory == (family is found):
                assert (d.decision != "not resolved") == settled == (d.p < 0.05)
                assert 0.95 - 1e-9 <= d.confidence <= 1 - 0.05 / len(family) + 1e-9


def raw(found: Decision) -> float:
    """The p-value of a claim alone, computed anew."""
    mean, std, n, s = found.difference.mean, found.difference.std, found.difference.n, found.smallest
    if found.claim.direction == "lower":
        return p_value(mean + s, std, n)
    if found.claim.direction == "higher":
        return p_value(mean - s, std, n)
    return max(p_value(mean + s, std, n), p_value(mean - s, std, n))


@settings(deadline=None, max_examples=40)
@given(sections, st.floats(-1.5, 1.5), directions)
def test_a_further_claim_never_resolves_another_and_an_exploratory_one_touches_no_planned(
    spec: list[tuple[float, str, bool]], shift: float, direction: str
) -> None:
    before = section(spec)
    for exploratory in (False, True):
        after = section([*spec, (shift, direction, exploratory)])[:-1]
        for old, new in zip(before, after, strict=True):
            assert new.p >= old.p
            assert new.decision in (old.decision, "not resolved")
            if exploratory and not old.claim.exploratory:
                assert new == old


def test_a_claim_without_runs_counts_and_one_stated_twice_does_not() -> None:
    results = {("A", "loss"): noisy(0.9, 5), ("B", "loss"): noisy(1.0, 5, seed=1)}
    first, empty = Claim("A", "B", "loss", "lower"), Claim("C", "B", "loss", "lower")
    alone, with_empty = decide([first], results)[0], decide([first, empty], results)
    twice = decide([first, Claim("B", "A", "loss", "higher")], results)
    assert with_empty[0].p == pytest.approx(2 * alone.p)
    assert with_empty[0].confidence == pytest.approx(0.975)
    assert (with_empty[1].decision, with_empty[1].p) == ("not resolved", None)
    assert "no common seed" in with_empty[1].why
    assert [d.p for d in twice] == [alone.p, alone.p]
    assert decide([], {}) == []


def test_two_seeds_decide_nothing_and_say_a_range() -> None:
    found = one(runs([0.1000001234, 0.1000004567]), runs([0.9000003456, 0.9000007891]))
    assert (found.decision, found.difference.ci95) == ("not resolved", None)
    assert "needs 3" in found.why
    assert found.further_seeds[0] == 1
    wide = one(noisy(1.0, 2, 1.0), noisy(1.1, 2, 1.0, seed=1))
    assert wide.further_seeds[1] is None or wide.further_seeds[1] > 20 * wide.further_seeds[0]


def test_further_seeds_resolve_at_both_ends_of_the_spread() -> None:
    found = one(noisy(1.0, 4, 0.1), noisy(1.02, 4, 0.1, seed=5), "lower", 0.0)
    low, high = found.further_seeds
    mean, std, n = found.difference.mean, found.difference.std, 4
    from scipy.stats import chi2

    for tail, further in ((0.9, low), (0.1, high)):
        spread = std * math.sqrt(3 / chi2.ppf(tail, 3))
        assert half_width(spread, n + further) < abs(mean) <= half_width(spread, n + further - 1)


def test_the_same_seed_twice_is_not_two_seeds() -> None:
    a, b = noisy(0.9, 3), noisy(1.0, 3, seed=1)
    plain = one(a, b)
    repeated = one([*a, *a, *a], b)
    assert (repeated.difference, repeated.p) == (plain.difference, plain.p)
    assert "seed 0 of A ran 3 times with one value, counted once" in repeated.notes
    copied = one(
        [*a, *(Value(9 + v.seed, v.value) for v in a)], [*b, *(Value(9 + v.seed, v.value) for v in b)]
    )
    assert (copied.difference, copied.p) == (plain.difference, plain.p)
    assert "seeds 0 and 9 of A gave exactly the same value, counted once" in copied.notes


def test_two_values_of_one_seed_are_a_fault_that_is_said() -> None:
    found = one([*noisy(0.9, 4), Value(2, 0.95)], noisy(1.0, 4, seed=1))
    assert found.seeds == (0, 1, 3)
    assert any(note.startswith("seed 2 of A gave ") and "0.95" in note for note in found.notes)


def test_failed_runs_and_seeds_without_a_pair_are_said_and_never_averaged() -> None:
    a = [*noisy(0.9, 3), Value(3, None, "diverged"), Value(4, math.nan), Value(5, math.inf), Value(6, 0.9)]
    found = one(a, noisy(1.0, 3, seed=1))
    assert found.seeds == (0, 1, 2)
    assert "3 of 7 seeds of A gave no value: 3 (diverged), 4 (not finite), 5 (not finite)" in found.notes
    assert "seed 6 of A omitted: B has no value" in found.notes
    huge = one([*noisy(0.9, 3), Value(3, 1e308), Value(4, -1e200)], runs([1.0, 1.5, 1.7, -1e308, 1.0]))
    assert huge.seeds == (0, 1, 2)
    assert any("too large to compare" in note for note in huge.notes)
    retried = one([*noisy(0.9, 3), Value(0, None, "failed")], noisy(1.0, 3, seed=1))
    assert (retried.seeds, retried.notes) == ((0, 1, 2), ())


@pytest.mark.parametrize(
    ("a", "part"),
    [
        ([Value(s, 0.123456789012) for s in range(4)], "not independent"),
        ([Value(s, 1.0) for s in range(4)], "not independent"),
        ([Value(s, 0.9 + s / 7, configuration=str(s % 2)) for s in range(4)], "2 configurations"),
        ([Value(s, 0.9 + s / 7, data="other") for s in range(4)], "different data"),
        ([Value(0, 1.5), Value(1, 2.5), Value(2, 3.5)], "spread is unknown"),
        ([], "no common seed"),
    ],
)
def test_what_cannot_be_compared_resolves_nothing(a: list[Value], part: str) -> None:
    b = [Value(s, x, data="ours", configuration="b") for s, x in enumerate([1.0, 2.0, 3.0, 4.5])]
    for direction, smallest in (("lower", 0.0), ("higher", 0.0), ("equal", 10.0)):
        found = one(a, b, direction, smallest)
        assert (found.decision, found.p, found.further_seeds) == ("not resolved", None, None)
        assert part in found.why


def test_runs_that_agree_digit_for_digit_are_equal_and_rounding_is_no_spread() -> None:
    a = noisy(1.0, 3)
    assert one(a, a, "equal", 0.01).decision == "supported"
    assert one(a, a, "lower").decision == "refuted"
    assert "exactly the same value" in one(a, a, "lower").why
    coarse = runs([0.5, 0.75, 1.0])
    assert one(coarse, coarse, "equal", 0.01).decision == "not resolved"
    assert one(runs([1e99, 1e98, 1e97]), runs([1e-9, 1e-99, 2e-9])).decision == "not resolved"
    assert one(runs([0.3, 0.7, 0.9]), runs([0.2, 0.6, 0.8]), "higher").decision == "not resolved"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("A", "B", "loss", "better"), "direction"),
        (("A", "A", "loss", "lower"), "compared with itself"),
        (("A", "B", "loss", "equal"), "no smallest difference"),
        (("A", "B", "loss", "lower", -1.0), "smallest_difference"),
        (("A", "B", "loss", "lower", math.nan), "smallest_difference"),
        (("A", "B", "loss", "lower", "much"), "smallest_difference"),
    ],
)
def test_a_claim_that_cannot_be_decided_is_refused(arguments: tuple, part: str) -> None:
    with pytest.raises(HeadwiseError, match=part):
        Claim(*arguments)


def test_looking_after_every_seed_keeps_the_error_rate() -> None:
    found = null("normal", notebooks=25, seeds=10, comparisons=3)
    assert found["wrong"] <= 3


def test_the_noise_floor_covers_the_true_spread_and_says_what_can_be_seen() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        floor = noise_floor(runs(rng.standard_normal(4).tolist()), pairs=())
        covered += floor.std_low <= 1 <= floor.std_high
    assert 180 <= covered <= 198
    floor = noise_floor(noisy(1.0, 4))
    sizes = [row.difference for row in floor.detectable]
    assert sizes == sorted(sizes, reverse=True)
    assert all(row.low < row.difference < row.high for row in floor.detectable)
    assert noise_floor(noisy(1.0, 4), comparisons=3).detectable[1].difference > sizes[1]
    assert "standard deviation" in floor.text


def test_a_noise_floor_of_one_seed_or_of_equal_seeds_is_none() -> None:
    for given_, part in (
        ([], "no seed"), (runs([1.0]), "one seed shows no spread"), (runs([0.5, 0.5]), "not independent"),
        ([*noisy(1, 1)] * 3, "one seed"),
    ):  # fmt: skip
        floor = noise_floor(given_)
        assert (floor.std_low, floor.detectable) == (None, ())
        assert part in floor.text


def test_a_decision_keeps_what_the_claim_said() -> None:
    claim = Claim("A", "B", "loss", "lower", "0.5%", exploratory=True)
    found = decide([claim], {("A", "loss"): noisy(0.9, 5), ("B", "loss"): noisy(2.0, 5, seed=1)})[0]
    assert (found.claim, found.decision) == (claim, "supported")
    assert found.smallest == pytest.approx(0.01, rel=1e-2)
    assert replace(found.claim, exploratory=False).question == claim.question
