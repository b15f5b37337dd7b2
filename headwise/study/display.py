"""One live display of a study's runs, drawn from their folders."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headwise.runs.folder import RESULTS, state_of
from headwise.study.plan import PlannedRun


class StudyDisplay:
    """A bar over all runs with an ETA and what is running; on a pipe, a line for each run that ends.

    Attributes:
        total: all runs, also those that are planned once the results of others are known.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._began = time.monotonic()
        self._drawn = 0.0
        self._said: set[str] = set()
        self._first: float | None = None
        self._live = sys.stderr.isatty()
        self._statuses: dict[Path, tuple[tuple[int, ...], dict[str, Any]]] = {}
        self._runs: Sequence[PlannedRun] = ()
        if self._live:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (BarColumn(bar_width=28), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("study", total=1.0, text="starting")
            self._bar.start()

    def __call__(self, runs: Sequence[PlannedRun]) -> None:
        """Redraw, at most twice a second."""
        self._runs = runs
        if time.monotonic() - self._drawn >= 0.5:
            self._draw(runs)

    def _draw(self, runs: Sequence[PlannedRun]) -> None:
        self._drawn = time.monotonic()
        statuses = {id(run): self._status(run) for run in runs}
        states = {key: state_of(status) for key, status in statuses.items()}
        shares = [_share(statuses[id(run)], states[id(run)]) for run in runs]
        done = sum(shares) / max(self.total, len(shares))
        self._first = done if self._first is None else self._first
        text = f"{_count(states.values())}  {self._left(done)}"
        for run in runs:
            self._say_end(run, states[id(run)], statuses[id(run)], text)
        if self._live:
            running = [_running(r, statuses[id(r)]) for r in runs if states[id(r)] == "running"]
            self._bar.update(self._task, completed=done, text="  ".join([text, *running]))

    def close(self) -> None:
        """Say what is left to say, and leave the terminal as it was."""
        if self._runs:
            self._draw(self._runs)
        if self._live:
            self._bar.stop()

    def _status(self, run: PlannedRun) -> dict[str, Any]:
        """The run's status, read again where the file changed: of a thousand runs most rest."""
        path = run.folder.path / "status.json"
        try:
            found = os.stat(path)
        except OSError:
            return {"state": "planned"}
        seen = (found.st_mtime_ns, found.st_ino, found.st_size)
        if path not in self._statuses or self._statuses[path][0] != seen:
            self._statuses[path] = (seen, run.folder.read_status())
        return self._statuses[path][1]

    def _left(self, done: float) -> str:
        assert self._first is not None
        if done - self._first < 1e-3:
            return "time left unknown"
        seconds = (time.monotonic() - self._began) / (done - self._first) * (1 - done)
        return f"{seconds:.0f} s left"

    def _say_end(self, run: PlannedRun, ended: str, status: dict[str, Any], text: str) -> None:
        name = f"{run.variant}/seed_{run.config.seed}"
        if ended in ("running", "planned") or name in self._said:
            return
        self._said.add(name)
        line = f"{name}: {ended}  ({status.get('reason', '')})  {text}"
        if self._live:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)


def _share(status: dict[str, Any], now: str) -> float:
    if now in (*RESULTS, "skipped", "failed"):
        return 1.0
    return status.get("step", 0) / max(1, status.get("max_steps", 1))


def _running(run: PlannedRun, status: dict[str, Any]) -> str:
    speed = status.get("tokens_per_sec")
    rate = f" {speed / 1e3:.1f}k tok/s" if speed else ""
    return f"{run.variant}/{run.config.seed} {status.get('step', 0)}/{status.get('max_steps', '?')}{rate}"


def _count(states: Any) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(states).items())
