"""Labels of heads whose attention is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headwise.functional.head_stats import weights_stats
from headwise.measures.labels import RULES, classify

T = 64


def patterns() -> dict[str, torch.Tensor]:
    """Weights `(T, T)` of heads that do one thing."""
    causal = torch.ones(T, T).tril()
    position = torch.arange(T)
    sink, previous, itself = torch.zeros(3, T, T)
    sink[:, 0] = 1
    previous[position, (position - 1).clamp_min(0)] = 1
    itself[position, position] = 1
    near = causal * (position[:, None] - position < 3)
    far = torch.zeros(T, T)
    far[position, position // 2] = 1
    third = causal * (position < position[:, None] // 3 + 1)
    named = {
        "sink": sink,
        "previous-token": previous,
        "local": near,
        "sharp": far,
        "broad": causal,
        "mixed": third,
    }
    return {name: weights / weights.sum(-1, keepdim=True) for name, weights in named.items()}


def means(weights: torch.Tensor) -> dict[str, np.ndarray]:
    columns = weights_stats(weights[None]).columns()
    found = {name: value.mean((0, 2)).numpy() for name, value in columns.items()}
    uniform = {"uniform_keys": (T + 1) / 2, "uniform_distance": (T - 1) / 4}
    return found | {name: np.full(len(weights), value) for name, value in uniform.items()}


def test_each_pattern_gets_its_name():
    found = classify(means(torch.stack(list(patterns().values()))))
    assert [labels[0] for labels in found] == list(patterns())


def test_all_that_holds_is_kept():
    assert classify(means(patterns()["previous-token"][None])) == [["previous-token", "local", "sharp"]]


def test_without_a_measure_its_rules_do_not_hold():
    measured = means(torch.stack(list(patterns().values())))
    del measured["sink_weight"]
    assert all("sink" not in labels for labels in classify(measured))
    measured["max_weight"][:] = np.nan
    assert all("sharp" not in labels for labels in classify(measured))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.label)
def test_a_rules_words_state_its_threshold(rule):
    assert str(rule.threshold) in rule.text
    assert ("at least" if rule.above else "at most") in rule.text
