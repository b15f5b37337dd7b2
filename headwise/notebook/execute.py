"""Where a notebook's runs are executed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from headwise.study.executor import EXECUTORS, Resources, executor_named, run_all
from headwise.study.plan import PlannedRun

__all__ = ["EXECUTORS", "execute"]


def execute(
    runs: Sequence[PlannedRun],
    *,
    workers: int,
    executor: str,
    folder: Path,
    show: Callable[[Sequence[PlannedRun]], None],
) -> bool:
    """Run what has not ended, `workers` at a time; returns False when Ctrl-C stopped it.

    Args:
        executor: one of `EXECUTORS`. A run has one GPU where it asks for CUDA and is not on this machine.
        folder: where Slurm's logs go.

    Raises:
        HeadwiseError: the executor is not known, or not installed.
    """
    if executor == "local":
        workers = max(1, min(workers, len(runs)))
        resources = Resources(max(1, (os.cpu_count() or 1) // workers), workers=workers)
    else:
        resources = Resources(gpus=int(any(run.config.device.startswith("cuda") for run in runs)))
    return run_all(runs, executor_named(executor, resources, folder), show=show)
