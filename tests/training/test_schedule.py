"""Learning rates: laws that hold for every length, warm-up and shape."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.config.training import SCHEDULES, TrainingConfig
from headwise.training.schedule import learning_rate


def rates(steps: int, **values: object) -> list[float]:
    config = TrainingConfig(max_steps=steps, **values)  # type: ignore[arg-type]
    return [learning_rate(step, steps, config) for step in range(steps)]


@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    floor=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_rates_stay_between_zero_and_the_peak(
    schedule: str, steps: int, warmup: int, floor: float, decay: float
) -> None:
    lr = rates(steps, lr=0.5, schedule=schedule, warmup_steps=warmup, min_lr_share=floor, decay_share=decay)
    assert all(0 < rate <= 0.5 * (1 + 1e-12) or (rate == 0 and 0.5 * floor == 0) for rate in lr)
    risen = min(warmup, steps - 1)
    assert lr[: risen + 1] == sorted(lr[: risen + 1]) or schedule == "wsd"  # decay may begin in the warm-up
    assert lr[risen:] == sorted(lr[risen:], reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_reaches_the_peak_and_the_end_is_the_floor(schedule: str) -> None:
    lr = rates(100, lr=2.0, schedule=schedule, warmup_steps=9, min_lr_share=0.25, decay_share=0.3)
    assert lr[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    assert lr[-1] == pytest.approx(2.0 if schedule == "constant" else 0.5)


def test_shapes() -> None:
    cosine = rates(11, lr=1.0, schedule="cosine", warmup_steps=0, min_lr_share=0.0)
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(11)])
    wsd = rates(20, lr=1.0, schedule="wsd", warmup_steps=0, min_lr_share=0.0, decay_share=0.25)
    assert wsd == pytest.approx([1.0] * 15 + [0.8, 0.6, 0.4, 0.2, 0.0])
