"""Progress while runs go on, without taking their time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from headwise.study.plan import PlannedRun

SHARE = 50
"""Drawing takes at most one part in so many of the time: a thousand runs are a thousand folders to read."""


class Display(Protocol):
    """Draws the progress of runs."""

    def __call__(self, runs: Sequence[PlannedRun]) -> None:
        """Draw."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Calm:
    """A display that is called no more often than it is quick."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._next = 0.0

    def __call__(self, runs: Sequence[PlannedRun]) -> None:
        """Draw, if the last time lies far enough back."""
        began = time.monotonic()
        if began < self._next:
            return
        self._display(runs)
        ended = time.monotonic()
        self._next = ended + SHARE * (ended - began)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._display.close()
