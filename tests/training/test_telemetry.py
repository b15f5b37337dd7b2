"""What a run says of itself, with a clock that a test can turn."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.training.telemetry import WINDOW, Step, Telemetry


class Clock:
    """Stands in for `time.perf_counter`."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("headwise.training.telemetry.time.perf_counter", clock)
    return clock


def telemetry(smoothing: float = 0.9) -> Telemetry:
    return Telemetry(smoothing, tokens_per_step=10, flops_per_step=1000)


def step(n: int, loss: float = 1.0, norm: float = 1.0, wait: float = 0.0) -> Step:
    return Step(n, loss, norm, 0.1, wait)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0, 0.999))
def test_smooth_loss_is_an_exponential_mean(losses: list[float], smoothing: float) -> None:
    """Σ s^(n-i) x_i / Σ s^(n-i): a weighted mean from the first step on, without a start at 0."""
    seen = telemetry(smoothing)
    for n, loss in enumerate(losses, 1):
        seen.add(step(n, loss))
    weights = [smoothing ** (len(losses) - n) for n in range(1, len(losses) + 1)]
    mean = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert seen.smooth_loss == pytest.approx(mean, rel=1e-6, abs=1e-9)


def test_speed_is_of_the_last_steps_alone_and_leaves_out_what_was_no_step(clock: Clock) -> None:
    seen = telemetry()
    seen.restart_clock()
    for n in range(1, 2 * WINDOW + 1):
        clock.now += 2.0 if n <= WINDOW else 0.5
        seen.add(step(n, wait=0.1))
        clock.now += 60.0  # an evaluation
        seen.restart_clock()
    speed = seen.speed()
    assert speed["step_time_ms"] == pytest.approx(500)
    assert speed["tokens_per_sec"] == pytest.approx(20)
    assert speed["flops_per_sec"] == pytest.approx(2000)
    assert speed["data_wait"] == pytest.approx(0.2)
    totals = seen.totals()
    assert totals["train_s"] == pytest.approx(2.5 * WINDOW)
    assert totals["data_wait"] == pytest.approx(0.1 / 1.25)
    assert (totals["tokens"], totals["flops"]) == (20 * WINDOW, 2000 * WINDOW)


def test_the_first_step_warms_up(clock: Clock) -> None:
    seen = telemetry()
    seen.restart_clock()
    times = []
    for n, duration in enumerate((90.0, 0.5, 1.5), 1):
        clock.now += duration
        seen.add(step(n))
        times.append(seen.speed()["step_time_ms"])
    assert times == pytest.approx([90_000, 500, 1000])
    assert seen.totals()["train_s"] == pytest.approx(92)


def test_before_the_first_step_nothing_is_known() -> None:
    seen = telemetry()
    assert seen.smooth_loss is None
    assert set(seen.speed().values()) == {None}
    assert seen.totals()["nonfinite_share"] == 0


def test_spikes_are_measured_against_the_running_median() -> None:
    seen = telemetry()
    norms = [1.0] * 9 + [50.0] + [1.0] * 5 + [10.0, 10.1, 11.0] + [1.0] * 2  # nothing counts before ten norms
    for n, norm in enumerate(norms, 1):
        seen.add(step(n, norm=norm))
    assert seen.spikes == 2
    assert seen.totals()["spike_share"] == 2 / 20


def test_steps_that_are_not_finite_are_counted_and_kept_out_of_the_means() -> None:
    seen = telemetry()
    seen.add(step(1, 2.0))
    for n, (loss, norm) in enumerate([(math.nan, 1.0), (1.0, math.inf), (math.nan, math.nan)], 2):
        seen.add(step(n, loss, norm))
    assert (seen.nonfinite, seen.nonfinite_in_a_row, list(seen.norms)) == (3, 3, [1.0])
    assert seen.smooth_loss == pytest.approx(2.0)
    seen.add(step(5, 2.0))
    assert (seen.nonfinite, seen.nonfinite_in_a_row) == (3, 0)
    assert seen.totals()["nonfinite_share"] == 3 / 5


def test_a_resume_goes_on_with_the_same_numbers() -> None:
    whole, first = telemetry(), telemetry()
    for n in range(1, 13):
        whole.add(step(n, 1 / n, n))
        if n <= 7:
            first.add(step(n, 1 / n, n))
    second = telemetry()
    second.restore(json.loads(json.dumps(first.state())))
    for n in range(8, 13):
        second.add(step(n, 1 / n, n))
    timings = {"train_s", "data_wait"}
    assert {k: v for k, v in second.totals().items() if k not in timings} == {
        k: v for k, v in whole.totals().items() if k not in timings
    }
    assert second.norms == whole.norms
