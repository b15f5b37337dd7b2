"""What masks do, in numbers, against what can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.questions.masks.numbers import (
    EDGES,
    absorbed,
    attacked_alike,
    differences,
    distances,
    histogram,
    kept_share,
    numbers,
)


def attack(length: int, *taken: tuple[int, int, float]) -> np.ndarray:
    """S with the given (query, key, amount)."""
    found = np.zeros((1, length, length), np.float32)
    for query, key, amount in taken:
        found[0, query, key] = amount
    return found


def taken_by(attack: np.ndarray) -> np.ndarray:
    return np.pad(attack.cumsum(1), ((0, 0), (1, 0), (0, 0)))[:, :-1]


def test_a_prompt_by_hand() -> None:
    """Key 1 loses 0.4 to the next query, then twice as much as it has left; key 3 is attacked too late."""
    s = attack(6, (2, 1, 0.4), (4, 1, 1.2), (5, 3, 9.0))
    found = numbers(s, taken_by(s))
    assert found["attack"]["shares"] == pytest.approx([0, 0.4 / 10.6, 9 / 10.6, 1.2 / 10.6, 0, 0])
    assert found["attack"]["median"] == 2
    assert found["effect"]["total"] == pytest.approx(1)
    assert found["effect"]["shares"] == pytest.approx([0, 0.4, 0, 0.6, 0, 0])
    assert found["effect"]["median"] == 3
    assert found["tokens"] == 4  # keys 1 to 4: the first is protected, nothing comes after the last
    assert found["masked"] == pytest.approx(1 / 4)
    assert found["masked_seasoned"] is None
    assert found["graded"] == 0
    assert found["graded_pairs"] == pytest.approx(2 / 10)  # key 1 before queries 3 and 4
    assert found["kept_context"] == pytest.approx((1 + 2 + 3 + 3.6 + 4.6 + 5) / 21)
    assert numbers(s, taken_by(s), adds_up=False)["effect"] is None


def test_tokens_with_many_later_queries_are_counted_apart() -> None:
    s = attack(40, (20, 3, 1.0))
    found = numbers(s, taken_by(s))
    assert (found["seasoned"], found["masked_seasoned"]) == (7, pytest.approx(1 / 7))
    assert found["masked"] == pytest.approx(1 / 38)


def test_what_is_given_back_counts_apart() -> None:
    s = attack(4, (2, 1, 1.0), (3, 1, -0.25))
    found = numbers(s, taken_by(s))
    assert found["attack"]["total"] == 1
    assert found["given_back"] == 0.25


def test_nothing_attacked() -> None:
    nothing = np.zeros((2, 5, 5), np.float32)
    found = numbers(nothing, nothing)
    assert found["attack"] is found["effect"] is found["given_back"] is absorbed(nothing, nothing) is None
    assert (found["masked"], found["graded"], found["kept_context"]) == (0, 0, 1)
    assert differences(nothing) == [{"masks": [0, 1], "difference": 0, "correlation": None}]


@given(st.integers(3, 40), st.booleans(), st.booleans())
def test_attacking_all_alike_is_the_distances_of_equal_attacks(length: int, bos: bool, itself: bool) -> None:
    alike = np.tri(length, k=-1 if itself else 0)[None]
    if bos:
        alike[..., 0] = 0
    expected = distances(alike)
    found = attacked_alike(length, protect_bos=bos, protect_self=itself)
    assert expected is not None
    assert found["shares"] == pytest.approx(expected["shares"])
    assert {n: found[n] for n in ("median", "mean", "near")} == pytest.approx(
        {n: expected[n] for n in ("median", "mean", "near")}
    )


def test_bins_hold_everything() -> None:
    values = np.array([-3.0, 0.0, 0.04, 0.05, 0.99, 1.0, 9.9, 10.0, 1e4])
    found = histogram(values)
    assert found is not None
    assert [round(share * 9) for share in found] == [3, 1, 0, 0, 0, 1, 1, 0, 1, 2]
    assert len(found) == len(EDGES)


def test_masks_differ_by_what_they_leave() -> None:
    s = np.concatenate([attack(4, (1, 0, 5.0)), attack(4, (1, 0, 1.0)), attack(4, (2, 1, 1.0))])
    same, first, second = differences(taken_by(s))
    assert same["masks"] == [0, 1]
    assert (same["difference"], same["correlation"]) == (0, pytest.approx(1))
    assert first["difference"] == second["difference"] == pytest.approx(3 / 6)
    assert first["correlation"] < 0.5
    assert kept_share(taken_by(s)[:1]) == pytest.approx(8 / 10)


def test_protection_absorbs_what_is_not_taken() -> None:
    s = attack(4, (1, 0, 3.0), (2, 1, 1.0), (3, 2, 7.0))
    taken = taken_by(attack(4, (1, 0, 2.0)))
    assert absorbed(s, taken) == pytest.approx(1 - 2 / 4)  # the last query's attack shows in no row


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1.0])
def test_a_constant_mask_has_no_correlation(value: float) -> None:
    constant, other = np.full((1, 9, 9), value), np.random.default_rng(0).random((1, 9, 9))
    (found,) = differences(np.concatenate([constant, other]))
    assert found["correlation"] is None
