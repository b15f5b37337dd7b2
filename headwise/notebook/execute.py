"""Where a notebook's runs are executed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headwise.errors import one_of
from headwise.study.local import run_all
from headwise.study.plan import PlannedRun

EXECUTORS = ("local",)


def execute(
    runs: Sequence[PlannedRun],
    *,
    workers: int,
    executor: str,
    show: Callable[[Sequence[PlannedRun]], None],
) -> bool:
    """Run what has not ended, `workers` at a time; returns False when Ctrl-C stopped it."""
    one_of("--executor", executor, EXECUTORS)
    return run_all(runs, workers=workers, show=show)
