"""Executes the runs of a study: the protocol of executors, and the driver that hands runs to an executor.

The driver chooses the next run, records the end of a run whose worker could not, and restarts runs that were
lost with their machine. An executor starts, watches and stops processes. The folder of a run is the only
record of its state.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from headwise.errors import HeadwiseError, one_of
from headwise.runs.folder import RESULTS, Outdated, RunFolder, state_of

if TYPE_CHECKING:
    from headwise.study.plan import PlannedRun

POLL_S = 0.2
TRIES = 5
"""The most times that a command starts a run whose machine is lost each time."""

EXECUTORS = {"local": "", "ray": "cluster", "slurm": "slurm"}
"""Name -> the extra of this package that the executor needs."""

TABLE_S, TABLE_SHARE = 10.0, 0.05
"""The table of all runs is rewritten every TABLE_S seconds, in at most this share of the time."""


@dataclass(frozen=True)
class Ending:
    """The end of a run's process, as its executor saw it.

    Attributes:
        run: the run as it was submitted.
        state, reason: written to the run's folder unless its worker recorded its end.
        lost: its machine, or the process that watched it there, is lost; the run starts again elsewhere.
    """

    run: PlannedRun
    state: str
    reason: str
    lost: bool = False


@dataclass(frozen=True)
class Parcel:
    """A pickled run for the process that trains it; the process that watches it need not import torch.

    Attributes:
        folder: the run's folder.
        timeout_s: the time limit of its training, in seconds.
        content: the `PlannedRun`, pickled.
    """

    folder: RunFolder
    timeout_s: float | None
    content: bytes


def parcel(run: PlannedRun) -> Parcel:
    """The parcel of a run."""
    return Parcel(run.folder, run.config.training.timeout_s, pickle.dumps(run))


@dataclass(frozen=True)
class Resources:
    """The resources of a run, and the number of runs at a time.

    Attributes:
        threads: the threads of each process of a run.
        gpus: the GPUs of a run; with several, torchrun starts one process per GPU.
        workers: the most runs at a time; None for as many as there is room for.
    """

    threads: int = 1
    gpus: int = 0
    workers: int | None = None

    @property
    def processes(self) -> int:
        """The processes of a run."""
        return max(1, self.gpus)

    @property
    def cpus(self) -> int:
        """The processors of a run."""
        return self.threads * self.processes


class Executor(Protocol):
    """Starts processes, here or on a cluster, each of which calls `headwise.study.work.work`."""

    def room(self) -> bool:
        """Whether one more run may be submitted now."""

    def submit(self, run: PlannedRun) -> None:
        """Start a run, or queue it."""

    def poll(self, wait_s: float) -> list[Ending]:
        """The runs that ended since the last call; waits up to `wait_s` seconds for the first."""

    def stop(self) -> None:
        """End all submitted runs: each finishes its step and saves, or is killed after a while."""


def run_all(
    runs: Sequence[PlannedRun],
    executor: Executor,
    *,
    show: Callable[[Sequence[PlannedRun]], None],
    on_end: Callable[[], None] = lambda: None,
    before: Sequence[PlannedRun] = (),
) -> bool:
    """Execute the runs that have not ended; a run that fails does not stop the others.

    Args:
        executor: the executor of the runs; it is stopped at the end.
        show: called a few times a second with all runs, to draw progress from their folders.
        on_end: called after runs have ended, at most every `TABLE_S` seconds, and at the end.
        before: those of `runs` that had their turn in this command: what failed there is not run again.

    Returns:
        False if Ctrl-C stopped it.
    """
    turned = set(map(id, before))
    waiting = [run for run in runs if id(run) not in turned and not _settled(run)]
    active = 0
    tries: Counter[str | None] = Counter()
    due, untold = time.monotonic() + TABLE_S, False
    try:
        while waiting or active:
            while waiting and executor.room() and (run := next_run(waiting)):
                tries[run.config.out] += 1
                executor.submit(_taken(run))
                active += 1
            show(runs)
            ended = executor.poll(POLL_S if active else 0)
            for ending in ended:
                active -= 1
                untold = True
                _record(ending)
                if ending.lost and state(ending.run) not in RESULTS and tries[ending.run.config.out] < TRIES:
                    waiting.append(ending.run)
            if untold and time.monotonic() > due:
                began, untold = time.monotonic(), False
                on_end()
                due = time.monotonic() + max(TABLE_S, (time.monotonic() - began) / TABLE_SHARE)
            if waiting and not active and not ended:  # other processes are executing them
                time.sleep(POLL_S)
        return True
    except KeyboardInterrupt:
        return False
    finally:
        executor.stop()
        for ending in executor.poll(0):
            _record(ending)
        if untold:
            on_end()
        show(runs)


def next_run(waiting: list[PlannedRun]) -> PlannedRun | None:
    """Take the next run that has not ended and that no other process is executing; None if there is none.

    Such other processes belong to a study that was killed, or to a machine that is alive but out of reach:
    they finish their step, save, and leave the run interrupted.
    """
    for run in list(waiting):
        now = state(run)
        if now != "running":
            waiting.remove(run)
            if now not in RESULTS:
                return run
    return None


def state(run: PlannedRun) -> str:
    """The state of a run, read from its folder."""
    return state_of(run.folder.read_status())


def _settled(run: PlannedRun) -> bool:
    now = state(run)
    if now in RESULTS or (now == "failed" and run.trial):
        return True  # also a run that could not start here, but ended where it could
    if run.skip is None:
        return False
    if not run.folder.holds_run():
        from headwise.config.run import to_yaml

        run.folder.start(to_yaml(run.config))
    run.folder.write_status("skipped", reason=run.skip)
    return True


def _taken(run: PlannedRun) -> PlannedRun:
    """`run` with the number of a new attempt; workers of earlier attempts can no longer write to its
    folder."""
    return dataclasses.replace(run, attempt=run.folder.take())


def _record(ending: Ending) -> None:
    """Record the end of a run unless its worker did.

    A trial that could not be worked on has not failed: a failure is its result, and would decide a search.
    """
    folder = ending.run.folder
    status = folder.read_status()
    if status.get("pid") is not None and status["state"] in (*RESULTS, "failed", "interrupted"):
        return
    trial = ending.run.trial and ending.state == "failed"
    with suppress(Outdated):
        folder.write_status("interrupted" if trial else ending.state, reason=ending.reason)


def executor_named(
    name: str,
    resources: Resources,
    folder: Path,
    *,
    address: str | None = None,
    slurm: Sequence[str] = (),
) -> Executor:
    """The executor that a command line selects.

    Args:
        name: one of `EXECUTORS`.
        resources: the resources of each run.
        folder: the study's folder, which holds Slurm's logs.
        address: the address of a Ray cluster.
        slurm: `KEY=VALUE` options of sbatch.

    Raises:
        HeadwiseError: the executor is unknown or not installed, or an option belongs to another executor.
    """
    one_of("--executor", name, EXECUTORS)
    for flag, value, owner in (("--address", address, "ray"), ("--slurm", slurm, "slurm")):
        if value and name != owner:
            raise HeadwiseError(f"{flag} is an option of --executor {owner}, but the executor is {name}")
    if name == "local":
        from headwise.study.local import Local

        return Local(resources.workers or 1, resources.threads, resources.processes)
    try:
        if name == "ray":
            from headwise.study.ray import Ray

            return Ray(address, resources)
        from headwise.study.slurm import Slurm

        return Slurm(resources, folder, slurm)
    except ImportError as error:
        raise HeadwiseError(
            f"--executor {name} needs {error.name}, which is not installed: "
            f"pip install 'headwise[{EXECUTORS[name]}]'"
        ) from error
