"""Executes the runs of a notebook with one of the executors of studies."""

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
    """Execute the runs that have not ended, `workers` at a time; returns False if Ctrl-C stopped it.

    Args:
        executor: one of `EXECUTORS`. On a cluster each run gets one GPU if any run is configured for CUDA.
        folder: the folder of Slurm's logs.

    Raises:
        HeadwiseError: the executor is unknown, or not installed.
    """
    if executor == "local":
        workers = max(1, min(workers, len(runs)))
        resources = Resources(max(1, (os.cpu_count() or 1) // workers), workers=workers)
    else:
        resources = Resources(gpus=int(any(run.config.device.startswith("cuda") for run in runs)))
    return run_all(runs, executor_named(executor, resources, folder), show=show)
