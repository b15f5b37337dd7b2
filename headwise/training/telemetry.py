"""What a run says of itself: losses, speed, stability, memory. Reads the device one step late, so
that it never waits for the step in flight."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

WINDOW = 50
"""Steps that speed and the share of waiting are averaged over, the first of a process left out."""

SPIKE = 10.0
"""A gradient norm above this multiple of the running median is a spike."""


@dataclass
class Step:
    """One finished optimizer step.

    Attributes:
        step: steps done, this one included.
        loss: mean over the tokens of the step, nats.
        grad_norm: before clipping.
        lr: the learning rate it was taken with.
        wait_s: seconds that the model waited for data.
        penalty: what layers added to the loss (the memory penalty), not part of `loss`.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    wait_s: float
    penalty: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether the step was applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class Telemetry:
    """Totals and windows over the steps of a run. `state()` goes into checkpoints."""

    smoothing: float
    tokens_per_step: int
    flops_per_step: int
    steps: int = 0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    spikes: int = 0
    smooth_sum: float = 0.0
    smooth_weight: float = 0.0
    trained_s: float = 0.0
    waited_s: float = 0.0
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _clock: float = field(default_factory=time.perf_counter)
    _warm: bool = False

    def add(self, step: Step) -> None:
        """Count one finished step; its duration is the time since the last one."""
        now = time.perf_counter()
        duration, self._clock = now - self._clock, now
        if self.durations and not self._warm:  # the first step compiles and warms up: no measure of speed
            self.durations.clear()
            self.waits.clear()
            self._warm = True
        self.durations.append(duration)
        self.waits.append(step.wait_s)
        self.trained_s += duration
        self.waited_s += step.wait_s
        self.steps = step.step
        if not step.finite:
            self.nonfinite += 1
            self.nonfinite_in_a_row += 1
            return
        self.nonfinite_in_a_row = 0
        if len(self.norms) >= 10 and step.grad_norm > SPIKE * median(self.norms):
            self.spikes += 1
        self.norms.append(step.grad_norm)
        self.smooth_sum = self.smoothing * self.smooth_sum + (1 - self.smoothing) * step.loss
        self.smooth_weight = self.smoothing * self.smooth_weight + (1 - self.smoothing)

    def restart_clock(self) -> None:
        """Leave out the time since the last step: it went into something else."""
        self._clock = time.perf_counter()

    @property
    def smooth_loss(self) -> float | None:
        """Exponential mean of the training loss, corrected for its start; None before a finite step."""
        return self.smooth_sum / self.smooth_weight if self.smooth_weight else None

    @property
    def step_time_s(self) -> float | None:
        """Mean seconds a step over the last `WINDOW`."""
        return sum(self.durations) / len(self.durations) if self.durations else None

    def speed(self) -> dict[str, float | None]:
        """tokens_per_sec, step_time_ms, flops_per_sec and data_wait (a share), over the last `WINDOW`."""
        seconds = self.step_time_s
        if not seconds:
            return dict.fromkeys(("tokens_per_sec", "step_time_ms", "flops_per_sec", "data_wait"))
        return {
            "tokens_per_sec": self.tokens_per_step / seconds,
            "step_time_ms": 1e3 * seconds,
            "flops_per_sec": self.flops_per_step / seconds,
            "data_wait": sum(self.waits) / sum(self.durations),
        }

    def totals(self) -> dict[str, Any]:
        """What the summary keeps: shares over the whole run."""
        return {
            "tokens": self.steps * self.tokens_per_step,
            "flops": self.steps * self.flops_per_step,
            "train_s": self.trained_s,
            "train_loss": self.smooth_loss,
            "nonfinite_share": self.nonfinite / max(1, self.steps),
            "spike_share": self.spikes / max(1, self.steps),
            "data_wait": self.waited_s / self.trained_s if self.trained_s else 0.0,
        }

    def state(self) -> dict[str, Any]:
        """Plain values to save; timing windows are not part of what a run computes."""
        names = (
            "steps", "nonfinite", "nonfinite_in_a_row", "spikes", "smooth_sum", "smooth_weight",
            "trained_s", "waited_s",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"norms": list(self.norms)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        for name, value in state.items():
            if name == "norms":
                self.norms.extend(value)
            else:
                setattr(self, name, value)
        self.restart_clock()


class Readings:
    """Loss, gradient norm and penalty on their way from the device: read one step late on a GPU."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, dict[str, Any]]] = deque()

    def send(self, loss: Tensor, grad_norm: Tensor, penalty: Tensor, **about: Any) -> None:
        """Start moving one step's numbers to the host."""
        values = torch.stack([value.detach().double() for value in (loss, grad_norm, penalty)])
        if not values.is_cuda:
            self._pending.append((values, None, about))
            return
        host = torch.empty(3, dtype=torch.float64, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event, about))

    def receive(self, *, all_of_them: bool = False) -> list[Step]:
        """The steps that are read by now: all but the last on a GPU, all of them on request."""
        steps = []
        while self._pending:
            values, event, about = self._pending[0]
            if event is not None:
                if len(self._pending) == 1 and not all_of_them:
                    break
                event.synchronize()
            self._pending.popleft()
            loss, norm, penalty = values.tolist()
            steps.append(Step(loss=loss, grad_norm=norm, penalty=penalty, **about))
        return steps


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak device memory since the last reset, in MB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_rss_mb() -> float:
    """Peak resident memory of this process, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
