"""Which heads are chosen: as many as asked, in the order asked, and never all of a layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import HeadwiseError
from headwise.questions.prune.choose import MODES, choose, units_of

UNITS = units_of({0: 4, 1: 4}, {0: 1, 1: 1})
VALUES = [5.0, 1.0, 7.0, 3.0, 6.0, 2.0, 8.0, 4.0]


def chosen(mode: str, fraction: float, *, per_layer: bool = False, values=VALUES, units=UNITS, seed=0):
    found = choose(
        units, values, mode=mode, fraction=fraction, per_layer=per_layer, rng=np.random.default_rng(seed)
    )
    return [(unit.layer, unit.heads[0]) for unit in found]


def test_the_order_of_each_mode() -> None:
    assert chosen("low", 0.25) == [(0, 1), (1, 1)]
    assert chosen("high", 0.25) == [(0, 2), (1, 2)]
    assert chosen("mixed", 0.5) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert chosen("mixed", 0.375) == [(0, 1), (1, 1), (1, 2)]  # the lowest, the highest, the next lowest


def test_ranking_within_layers_takes_as_many_of_each() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert chosen("low", 0.5, per_layer=True, values=values) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with pytest.raises(HeadwiseError, match=r"--fraction 0\.5 would remove every head of layer 0"):
        chosen("low", 0.5, values=values)
    with pytest.raises(HeadwiseError, match="every head of layer 1"):
        chosen("high", 0.5, values=values)


@settings(max_examples=60)
@given(
    heads=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    fraction=st.floats(0.01, 0.99),
    mode=st.sampled_from(MODES),
    per_layer=st.booleans(),
    seed=st.integers(0, 99),
)
def test_at_most_the_fraction_leaves_and_every_layer_keeps_a_head(
    heads: list[int], fraction: float, mode: str, per_layer: bool, seed: int
) -> None:
    units = units_of(dict(enumerate(heads)), dict.fromkeys(range(len(heads)), 1))
    values = np.random.default_rng(seed).integers(3, size=len(units)).astype(float).tolist()
    try:
        found = chosen(mode, fraction, per_layer=per_layer, values=values, units=units, seed=seed)
    except HeadwiseError as error:
        assert "--fraction" in str(error)  # noqa: PT017
        return
    assert len(found) == len(set(found)) >= 1
    groups = heads if per_layer else [sum(heads)]
    assert len(found) == sum(int(fraction * n + 1e-9) for n in groups)
    for layer, count in enumerate(heads):
        assert sum(at[0] == layer for at in found) < count


def test_a_random_choice_is_every_choice_that_leaves_a_head_in_each_layer() -> None:
    units = units_of({0: 2, 1: 2}, {0: 1, 1: 1})
    drawn = {tuple(chosen("random", 0.5, values=[0] * 4, units=units, seed=seed)) for seed in range(60)}
    assert drawn == {((0, a), (1, b)) for a in (0, 1) for b in (0, 1)}
    many = units_of(dict.fromkeys(range(40), 2), dict.fromkeys(range(40), 1))
    assert len(chosen("random", 0.5, values=[0] * 80, units=many)) == 40
    with pytest.raises(HeadwiseError, match="removing 3 of 4 removable heads cannot leave one in each of 2"):
        chosen("random", 0.75, values=[0] * 4, units=units)


@pytest.mark.parametrize(
    ("mode", "fraction", "said"),
    [
        ("lowest", 0.5, "'lowest' is not known.*choose from low, high, mixed, random"),
        ("low", 0.0, "above 0 and below 1"),
        ("low", 1.0, "above 0 and below 1"),
        ("low", float("nan"), "above 0 and below 1"),
        ("low", 0.1, "is less than one head; give 0.125 or more"),
    ],
)
def test_bad_input_is_one_sentence(mode: str, fraction: float, said: str) -> None:
    with pytest.raises(HeadwiseError, match=said):
        chosen(mode, fraction)


def test_units_are_heads_that_share() -> None:
    units = units_of({0: 4, 3: 2}, {0: 2, 3: 2})
    assert [(unit.layer, unit.heads) for unit in units] == [(0, (0, 1)), (0, (2, 3)), (3, (0, 1))]
