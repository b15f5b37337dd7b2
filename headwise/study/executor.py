"""Where the runs of a study run: a protocol, and the driver that hands runs to whatever implements it.

The driver decides which run is next, writes what became of it where its folder does not say, and starts again
what was lost with its machine. An executor starts, watches and stops. Both know a run by its folder: what the
folder says is what happened.
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
"""How often a command starts a run whose machine is lost each time."""

EXECUTORS = {"local": "", "ray": "cluster", "slurm": "slurm"}
"""Names, and the extra of the package that each needs."""

TABLE_S, TABLE_SHARE = 10.0, 0.05
"""What is made from all runs is made again after so many seconds, and in at most this share of the time."""


@dataclass(frozen=True)
class Ending:
    """How the process of a run ended, as its executor saw it.

    Attributes:
        run: as it was submitted.
        state, reason: written to the run's folder where its worker wrote nothing of its end.
        lost: its machine is gone, or what held its process there; it starts again elsewhere.
    """

    run: PlannedRun
    state: str
    reason: str
    lost: bool = False


@dataclass(frozen=True)
class Parcel:
    """A run on its way to the process that trains it: what watches that process imports no torch for it.

    Attributes:
        folder: of the run.
        timeout_s: of its training.
        content: the `PlannedRun`, pickled.
    """

    folder: RunFolder
    timeout_s: float | None
    content: bytes


def parcel(run: PlannedRun) -> Parcel:
    """A run, packed."""
    return Parcel(run.folder, run.config.training.timeout_s, pickle.dumps(run))


@dataclass(frozen=True)
class Resources:
    """What a run gets, and how many run at a time.

    Attributes:
        threads: of each process of a run.
        gpus: of a run; several make as many processes of it, as torchrun starts them.
        workers: runs at a time at most; None for as many as there is place for.
    """

    threads: int = 1
    gpus: int = 0
    workers: int | None = None

    @property
    def processes(self) -> int:
        """Of a run."""
        return max(1, self.gpus)

    @property
    def cpus(self) -> int:
        """Of a run."""
        return self.threads * self.processes


class Executor(Protocol):
    """Runs processes somewhere, each the body of `headwise.study.work.work`."""

    def room(self) -> bool:
        """Whether one more run may be submitted now."""

    def submit(self, run: PlannedRun) -> None:
        """Start a run, or queue it."""

    def poll(self, wait_s: float) -> list[Ending]:
        """The runs that ended since; waits up to `wait_s` seconds for the first."""

    def stop(self) -> None:
        """End everything that was submitted: runs finish their step and save; what does not is killed."""


def run_all(
    runs: Sequence[PlannedRun],
    executor: Executor,
    *,
    show: Callable[[Sequence[PlannedRun]], None],
    on_end: Callable[[], None] = lambda: None,
    before: Sequence[PlannedRun] = (),
) -> bool:
    """Run what has not ended yet; a run that fails does not stop the others.

    Args:
        executor: where they run; it is stopped at the end.
        show: called a few times a second with all runs, to draw progress from their folders.
        on_end: called after runs have ended, rarely (`TABLE_S`), and at the end.
        before: those of `runs` that had their turn in this command: what failed there is not run again.

    Returns:
        False when stopped by Ctrl-C before all had their turn.
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
            if waiting and not active and not ended:  # other processes have them
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
    """Take the next run that has not ended and that no other process runs just now; None where there is none.

    Others are those of a study that was killed, or on a machine that is lost to us and lives: they finish
    their step, save, and leave the run interrupted.
    """
    for run in list(waiting):
        now = state(run)
        if now != "running":
            waiting.remove(run)
            if now not in RESULTS:
                return run
    return None


def state(run: PlannedRun) -> str:
    """What the run's folder says."""
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
    """`run` for one more attempt: whoever worked on it under an earlier number writes nothing any more."""
    return dataclasses.replace(run, attempt=run.folder.take())


def _record(ending: Ending) -> None:
    """Write how a run ended unless its worker did.

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
    """The executor of a command line.

    Args:
        name: one of `EXECUTORS`.
        resources: of each run.
        folder: of the study, where Slurm's logs go.
        address: of a Ray cluster.
        slurm: `KEY=VALUE` of sbatch.

    Raises:
        HeadwiseError: it is not known or not installed, or an option is not its own.
    """
    one_of("--executor", name, EXECUTORS)
    for flag, value, owner in (("--address", address, "ray"), ("--slurm", slurm, "slurm")):
        if value and name != owner:
            raise HeadwiseError(f"{flag} belongs to --executor {owner}, and the executor is {name}")
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
