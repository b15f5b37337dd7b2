"""Executes runs on this machine, each in its own process, N at a time.

A process is stopped by closing its pipe; the pipe also closes when this program is killed. The process then
finishes its step, saves, and ends as interrupted.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from headwise.study.executor import Ending, Parcel, parcel

if TYPE_CHECKING:
    from headwise.study.plan import PlannedRun

GRACE_S = 60.0
"""Seconds that a run has to finish its step and save before it is killed."""

SERVER_DIED = 255
"""Exit code that multiprocessing reports if the fork server was killed, with a signal to the whole group."""

PRELOADED = ("headwise.study.plan", "headwise.study.fit", "torch._dynamo")
"""Modules that every run needs; they are imported once, before the processes fork."""


@dataclass
class Worker:
    """A process that works on a run."""

    parcel: Parcel
    process: BaseProcess
    pipe: Connection
    started: float
    gpus: list[str]

    def ending(self) -> tuple[str, str] | None:
        """State and reason of its end; None while it lives. One that outlives its time is killed."""
        timeout = self.parcel.timeout_s
        if timeout and time.monotonic() - self.started > timeout + GRACE_S and self.process.is_alive():
            self.kill()
            return "timed_out", f"killed {GRACE_S:g} s after its time limit of {timeout:g} s"
        if self.process.is_alive():
            return None
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        if code < 0:
            reason = f"its process was killed ({signal.Signals(-code).name}); the same command continues it"
            return "interrupted", reason
        if code == SERVER_DIED:
            return "interrupted", "its process was killed; the same command continues it"
        return "failed", f"its process ended with exit code {code}"

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Local:
    """An executor: processes on this machine.

    Args:
        workers: at a time.
        threads: of each; an equal share of the processors where not given.
        processes: of each run, as torchrun starts them. Each has a GPU of this machine's where there are any;
            runs take them in turn.
    """

    def __init__(self, workers: int, threads: int | None = None, processes: int = 1) -> None:
        self.workers = workers
        self.threads = threads or max(1, (os.cpu_count() or 1) // workers)
        self.processes = processes
        self._gpus = visible_gpus()
        self._active: list[tuple[PlannedRun, Worker]] = []

    def room(self) -> bool:
        """Whether fewer than `workers` run."""
        return len(self._active) < self.workers

    def submit(self, run: PlannedRun) -> None:
        """Start a process."""
        taken = [gpu for _, worker in self._active for gpu in worker.gpus]
        gpus = sorted(self._gpus, key=taken.count)[: self.processes]
        self._active.append((run, start(parcel(run), self.threads, gpus, self.processes)))

    def poll(self, wait_s: float) -> list[Ending]:
        """The runs whose processes ended."""
        if wait_s and self._active:
            wait([worker.process.sentinel for _, worker in self._active], wait_s)
        ended = [(run, worker.ending(), worker) for run, worker in self._active]
        self._active = [(run, worker) for run, ending, worker in ended if ending is None]
        return [Ending(run, *ending) for run, ending, _ in ended if ending is not None]

    def stop(self) -> None:
        """Let every process finish its step and save."""
        stop([worker for _, worker in self._active])


def start(parcel: Parcel, threads: int, gpus: list[str], processes: int = 1) -> Worker:
    """Start the process of a run in this folder; it sees these GPUs alone.

    Args:
        threads: of it, and of each of the processes that it starts.
        processes: as torchrun starts them; 1 for it alone.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *_main_needs()])
    inside, outside = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(parcel, inside, os.getcwd(), threads, gpus, processes))
    process.start()
    inside.close()
    return Worker(parcel, process, outside, time.monotonic(), gpus)


def stop(workers: list[Worker]) -> None:
    """Let processes finish their step and save; those that take longer than `GRACE_S` are killed."""
    for worker in workers:
        worker.pipe.close()
    try:
        ends = time.monotonic() + GRACE_S
        for worker in workers:
            worker.process.join(max(0.0, ends - time.monotonic()))
    finally:
        for worker in workers:
            if worker.process.is_alive():
                worker.kill()


def visible_gpus() -> list[str]:
    """This machine's GPUs as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _main_needs() -> list[str]:
    """What the main module imports, and with it every process: once here spares it to all of them."""
    return [name for name in ("ray",) if name in sys.modules]


def _work(parcel: Parcel, pipe: Connection, home: str, threads: int, gpus: list[str], processes: int) -> None:
    """The body of the process."""
    os.chdir(home)
    run: PlannedRun = pickle.loads(parcel.content)  # from the pipe of the process that started this one
    if run.config.device in ("auto", "cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    import torch

    from headwise.study.work import work

    for number in (signal.SIGINT, signal.SIGUSR2):  # Ctrl-C, and the signal of Slurm before the end of a job
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_stop_with_parent, args=(pipe,), daemon=True).start()
    torch.set_num_threads(threads)
    work(run, processes)


def _stop_with_parent(pipe: Connection) -> None:
    try:
        pipe.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
