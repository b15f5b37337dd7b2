"""Progress of runs, drawn at a limited cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from headwise.study.plan import PlannedRun

SHARE = 50
"""Drawing takes at most 1/SHARE of the time, because it reads the folder of every run."""


class Display(Protocol):
    """Draws the progress of runs."""

    def __call__(self, runs: Sequence[PlannedRun]) -> None:
        """Draw."""

    def close(self) -> None:
        """Restore the terminal."""


class Calm:
    """A display that is skipped while drawing would take too large a share of the time."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._next = 0.0

    def __call__(self, runs: Sequence[PlannedRun]) -> None:
        """Draw, if the last drawing is long enough ago."""
        began = time.monotonic()
        if began < self._next:
            return
        self._display(runs)
        ended = time.monotonic()
        self._next = ended + SHARE * (ended - began)

    def close(self) -> None:
        """Restore the terminal."""
        self._display.close()
