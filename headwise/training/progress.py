"""How a run shows that it is alive: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol


class Progress(Protocol):
    """Told of each step's numbers."""

    def start(self, step: int, max_steps: int) -> None:
        """Training begins at `step`."""

    def update(self, step: int, values: dict[str, Any]) -> None:
        """`step` steps are done."""

    def say(self, line: str) -> None:
        """Show a line that stays."""

    def stop(self) -> None:
        """Training ends."""


class Silent:
    """Shows nothing."""

    def start(self, step: int, max_steps: int) -> None:
        """Nothing."""

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Lines:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, every_s: float = 10.0) -> None:
        self.every_s = every_s
        self._shown = self._begun = 0.0
        self._first = self._last = 0

    def start(self, step: int, max_steps: int) -> None:
        """Remember where the estimate of the time left begins."""
        self._begun = self._shown = time.monotonic()
        self._first, self._last = step, max_steps

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Show the step, its numbers and the time left, unless something was shown just now."""
        now = time.monotonic()
        if now - self._shown < self.every_s:
            return
        self._shown = now
        left = (now - self._begun) / max(1, step - self._first) * (self._last - step)
        self.say(f"step {step}/{self._last}  {describe(values)}  {left:.0f} s left")

    def say(self, line: str) -> None:
        """Print the line on standard error."""
        print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Nothing is open."""


class Bar:
    """A live bar with rate and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            transient=True,
        )

    def start(self, step: int, max_steps: int) -> None:
        """Open the bar."""
        self._task = self._bar.add_task("train", total=max_steps, completed=step, numbers="")
        self._bar.start()

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step, numbers=describe(values))

    def say(self, line: str) -> None:
        """Print the line above the bar."""
        self._bar.console.print(line, highlight=False, markup=False)

    def stop(self) -> None:
        """Close the bar."""
        self._bar.stop()


def for_terminal() -> Progress:
    """A bar on a terminal, lines elsewhere."""
    return Bar() if sys.stderr.isatty() else Lines()


def describe(values: dict[str, Any]) -> str:
    """`loss 1.234  12.3k tokens/s`, of what is known."""
    parts = []
    if values.get("smooth_loss") is not None:
        parts.append(f"loss {values['smooth_loss']:.3f}")
    if values.get("val_loss") is not None:
        parts.append(f"val {values['val_loss']:.3f}")
    if values.get("tokens_per_sec"):
        parts.append(f"{values['tokens_per_sec'] / 1e3:.1f}k tokens/s")
    return "  ".join(parts)
