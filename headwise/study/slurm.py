"""Executes runs as jobs of Slurm, through submitit: one job per run, on storage that all nodes share.

Jobs outlive the command that submitted them. The same command, started again, waits for jobs that are
executing; jobs that were still queued end at once, because they were replaced. The result of a run is in its
folder. submitit pickles the call of a job into a folder that only the user's commands write; no result is
read from there.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import submitit

from headwise.errors import HeadwiseError
from headwise.runs.folder import RESULTS, Outdated
from headwise.study.executor import Ending, Parcel, Resources, parcel
from headwise.study.host import host
from headwise.study.local import GRACE_S

if TYPE_CHECKING:
    from headwise.study.plan import PlannedRun

LOGS = ".slurm"
MOST_JOBS = 500
"""The most jobs in Slurm's queue at a time."""

OWN = {
    "cpus_per_task": "use --cpus-per-run", "gpus": "use --gpus-per-run",
    "gpus_per_node": "use --gpus-per-run",
    "gres": "use --gpus-per-run", "ntasks": "use --gpus-per-run", "nodes": "a run uses one node",
    "array": "every run is a job", "output": f"logs lie in {LOGS}", "error": f"logs lie in {LOGS}",
    "signal": "leave it out", "open_mode": "leave it out", "job_name": "leave it out",
    "wrap": "leave it out", "chdir": "leave it out", "export": "leave it out",
}  # fmt: skip
"""Options of sbatch that headwise sets, each with its replacement or the reason."""

LOST = ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "REQUEUED", "INTERRUPTED")
"""States of jobs whose runs start again."""

ENDED_S = 5.0
"""Seconds after a job's end until its last writes are visible here."""


@dataclass
class _Job:
    run: PlannedRun
    job: Any
    ended: float | None = None


class Slurm:
    """The executor on Slurm.

    Args:
        resources: the resources of each run.
        folder: the study's folder; it holds the scripts and logs of jobs.
        options: `KEY=VALUE` options of sbatch, such as partition=gpu and time=04:00:00; `cluster=local` runs
            the jobs on this machine, without Slurm.

    Raises:
        HeadwiseError: an option is malformed or set by headwise itself, or Slurm is not installed.
    """

    def __init__(self, resources: Resources, folder: Path, options: Sequence[str] = ()) -> None:
        self.resources = resources
        self.options = parse_options(options)
        cluster = self.options.pop("cluster", "slurm")
        if cluster not in ("slurm", "local"):
            raise HeadwiseError(f"--slurm cluster={cluster} is unknown; use slurm or local")
        self._local = cluster == "local"
        try:
            self._submitit = submitit.AutoExecutor(folder / LOGS, cluster=cluster)
        except RuntimeError as error:
            raise HeadwiseError(
                "--executor slurm needs the commands of Slurm, which are not installed on this machine; "
                "--slurm cluster=local runs the jobs here without Slurm"
            ) from error
        self._home = os.getcwd()
        self._jobs: list[_Job] = []
        self._looked = 0.0
        self._stopping = False

    def room(self) -> bool:
        """Whether fewer jobs are submitted than allowed."""
        most = self.resources.workers or ((os.cpu_count() or 1) if self._local else MOST_JOBS)
        return len(self._jobs) < most

    def submit(self, run: PlannedRun) -> None:
        """Queue a job."""
        self._submitit.update_parameters(**self._parameters(run))
        try:
            job = self._submitit.submit(
                job_body, parcel(run), self._home, self.resources.threads, self.resources.gpus
            )
        except submitit.core.utils.FailedJobError as error:
            reason = " ".join(str(error).split())[-300:]
            raise HeadwiseError(f"Slurm refused the job of {run.folder.path}: {reason}") from error
        self._jobs.append(_Job(run, job))

    def poll(self, wait_s: float) -> list[Ending]:
        """The runs whose folders record an end, or whose jobs ended without recording one."""
        time.sleep(wait_s)
        every = max(wait_s, len(self._jobs) / 100)  # a large queue is polled less often
        if time.monotonic() - self._looked < every:
            return []
        self._looked = time.monotonic()
        found = {id(job): ending for job in self._jobs if (ending := self._ending(job))}
        self._jobs = [job for job in self._jobs if id(job) not in found]
        return list(found.values())

    def stop(self) -> None:
        """Cancel all jobs; executing ones save first."""
        self._stopping = True
        for job in self._jobs:
            job.job.cancel(check=False)
        ends = time.monotonic() + GRACE_S
        while any(_works(job.run) for job in self._jobs) and time.monotonic() < ends:
            time.sleep(0.1)
        self._jobs = []
        self._stopping = False

    def _ending(self, job: _Job) -> Ending | None:
        status = job.run.folder.read_status()
        state, reason = status["state"], str(status.get("reason") or "")
        if status.get("pid") is not None and state in (*RESULTS, "failed"):
            return Ending(job.run, state, reason)
        if status.get("pid") is not None and state == "interrupted":
            return Ending(job.run, state, reason, lost=reason.startswith("stopped") and not self._stopping)
        if not job.job.done():
            return None
        job.ended = job.ended or time.monotonic()
        if time.monotonic() - job.ended < ENDED_S:
            return None
        seen = job.job.state.split()[0] if job.job.state else "UNKNOWN"
        if seen in LOST:
            return Ending(job.run, "interrupted", f"its job ended in state {seen}", lost=True)
        if seen in ("OUT_OF_MEMORY", "TIMEOUT", "CANCELLED") or status.get("pid") is not None:
            return Ending(
                job.run, "interrupted", f"its job ended in state {seen}; the same command continues it"
            )
        return Ending(job.run, "failed", f"its job ended in state {seen}; its log is {job.job.paths.stderr}")

    def _parameters(self, run: PlannedRun) -> dict[str, Any]:
        timeout = run.config.training.timeout_s
        if not timeout and "time" not in self.options and not self._local:
            raise HeadwiseError(
                "--slurm time=HH:MM:SS is missing; give the time limit of a job, or set timeout_s in the "
                "study"
            )
        minutes = int((timeout or 3e7) + 2 * GRACE_S) // 60 + 5
        return {
            "name": "headwise", "timeout_min": minutes, "cpus_per_task": self.resources.cpus,
            "gpus_per_node": self.resources.gpus, "slurm_additional_parameters": self.options,
        }  # fmt: skip


def parse_options(options: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` of sbatch as a mapping, each key once.

    Raises:
        HeadwiseError: one is malformed, given twice, or decided by the executor.
    """
    found: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        key = key.replace("-", "_")
        if not equals or not re.fullmatch(r"[a-z][a-z0-9_]*", key) or not value or not value.isprintable():
            raise HeadwiseError(
                f"--slurm {option!r} is not KEY=VALUE, such as partition=gpu or time=04:00:00"
            )
        if key in OWN:
            raise HeadwiseError(f"--slurm {key} is set by headwise: {OWN[key]}")
        if key in found:
            raise HeadwiseError(f"--slurm {key} is given twice")
        found[key] = value
    return found


def job_body(parcel: Parcel, home: str, threads: int, gpus: int) -> None:
    """The body of a job: executes the run. The signals that Slurm sends before the end let the run save."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, stop)
    state, reason, _ = host(parcel, home, threads, gpus)
    status = parcel.folder.read_status()
    if status.get("pid") is None or status["state"] not in (*RESULTS, "failed", "interrupted"):
        with suppress(Outdated):
            parcel.folder.write_status(state, reason=reason)


def _works(run: PlannedRun) -> bool:
    """Whether a worker is still executing the run."""
    status = run.folder.read_status()
    return status.get("pid") is not None and status["state"] == "running"
