"""The verdict against random removals, and the laws that are tested beside each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headwise.errors import HeadwiseError
from headwise.questions.prune.numbers import against_random, laws, paired

BEFORE = np.linspace(1, 2, 20)


def draws(cost: float, spread: float) -> list[np.ndarray]:
    return [BEFORE + cost + spread * step for step in (-2, -1, 0, 1, 2)]


@pytest.mark.parametrize(
    ("cost", "spread", "verdict", "less"),
    [
        (0.1, 0.01, "better", 5),
        (0.9, 0.01, "worse", 0),
        (0.5, 0.01, "undecided", 2),
        (0.4, 0.5, "undecided", 3),
    ],
)
def test_the_verdict_needs_both_intervals(cost: float, spread: float, verdict: str, less: int) -> None:
    after = BEFORE + cost + 0.01 * np.sin(np.arange(20))
    found = against_random(BEFORE, after, draws(0.5, spread), "low")
    assert found is not None
    assert (found["verdict"], found["costs_less_than"]) == (verdict, less)
    assert found["delta"]["mean"] == pytest.approx(0.5)
    assert found["over_draws"]["mean"] == pytest.approx((after - BEFORE).mean() - 0.5)


def test_sequences_that_disagree_leave_it_undecided() -> None:
    after = BEFORE + 0.4 + np.where(np.arange(20) % 2, 1, -1)
    found = against_random(BEFORE, after, draws(0.5, 0.001), "low")
    assert found is not None
    assert found["over_draws"]["ci95"] < 0.01
    assert found["verdict"] == "undecided"


def test_one_draw_or_none_decides_nothing() -> None:
    assert against_random(BEFORE, BEFORE, [], "low") is None
    assert against_random(BEFORE, BEFORE, draws(0.5, 0)[:1], "low")["verdict"] == "undecided"
    assert against_random(BEFORE, BEFORE, draws(0.5, 0), "random")["verdict"] == "control"


def test_differences_are_paired_and_losses_must_be_numbers() -> None:
    found = paired(BEFORE, BEFORE + 0.25)
    assert found["delta"]["mean"] == pytest.approx(0.25)
    assert found["delta"]["ci95"] == pytest.approx(0, abs=1e-12)
    assert found["perplexity_after"] / found["perplexity_before"] == pytest.approx(math.exp(0.25))
    with pytest.raises(HeadwiseError, match="a loss is not finite"):
        paired(BEFORE, BEFORE * math.nan)


def test_laws_begin_with_the_measure_and_are_corrected_together() -> None:
    heads = [(0, h) for h in range(12)]
    importance = {at: float(i) for i, at in enumerate(heads)}
    noise = dict(zip(heads, np.random.default_rng(0).normal(size=12).tolist(), strict=True))
    known = {"k_eff": noise, "entropy": {at: -v for at, v in importance.items()}, "importance": importance}
    first, second = laws(known, importance, "entropy", 0)
    assert (first["measure"], second["measure"]) == ("entropy", "k_eff")
    assert first["rho"] == pytest.approx(-1)
    assert first["p_holm"] == pytest.approx(2 * first["p"])
    assert [law["measure"] for law in laws(known, importance, "importance", 0)] == [
        "importance",
        "k_eff",
        "entropy",
    ]
