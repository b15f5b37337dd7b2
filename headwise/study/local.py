"""Run planned runs: N at a time on this machine, each in its own process.

A process is stopped by closing its pipe, which is also what happens when this program is killed: it
then finishes its step, saves, and ends as interrupted.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from headwise.config.run import to_yaml
from headwise.errors import HeadwiseError
from headwise.runs.folder import RESULTS, state_of
from headwise.study.plan import PlannedRun

GRACE_S = 60.0
POLL_S = 0.2


@dataclass
class _Worker:
    run: PlannedRun
    process: BaseProcess
    pipe: Connection
    started: float
    gpu: str | None


def run_all(
    runs: Sequence[PlannedRun],
    *,
    workers: int,
    show: Callable[[Sequence[PlannedRun]], None],
    on_end: Callable[[], None] = lambda: None,
) -> bool:
    """Run what has not ended yet; a run that fails does not stop the others.

    Args:
        workers: processes at a time.
        show: called a few times a second with all runs, to draw progress from their folders.
        on_end: called after runs have ended.

    Returns:
        False when stopped by Ctrl-C before all had their turn.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["headwise.training.run"])
    waiting = [run for run in runs if not _settled(run)]
    threads = max(1, (os.cpu_count() or 1) // min(workers, max(1, len(waiting))))
    gpus = _gpus()
    active: list[_Worker] = []
    try:
        while waiting or active:
            while len(active) < workers and (run := _next(waiting)):
                taken = [worker.gpu for worker in active]
                gpu = min(gpus, key=taken.count) if gpus else None
                active.append(_start(context, run, threads, gpu))
            still = [worker for worker in active if not _ended(worker)]
            if len(still) < len(active):
                on_end()
            active = still
            show(runs)
            if active:
                active[0].process.join(POLL_S)
            elif waiting:
                time.sleep(POLL_S)
        return True
    except KeyboardInterrupt:
        for worker in active:
            worker.pipe.close()
        for worker in active:
            worker.process.join(GRACE_S)
        return False
    finally:
        for worker in active:
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        show(runs)


def _next(waiting: list[PlannedRun]) -> PlannedRun | None:
    """Take the next run that has not ended and that no other process runs just now; None where there is none.

    Others are those of a study that was killed: they finish their step, save, and leave the run interrupted.
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
    if state(run) in RESULTS:  # also a run that could not start here, but ended where it could
        return True
    if run.skip is None:
        return False
    if not run.folder.holds_run():
        run.folder.start(to_yaml(run.config))
    run.folder.write_status("skipped", reason=run.skip)
    return True


def _start(context: Any, run: PlannedRun, threads: int, gpu: str | None) -> _Worker:
    inside, outside = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(run, inside, threads, gpu))
    process.start()
    inside.close()
    return _Worker(run, process, outside, time.monotonic(), gpu)


def _gpus() -> list[str]:
    """This machine's GPUs as CUDA_VISIBLE_DEVICES names them; runs take them in turn."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _ended(worker: _Worker) -> bool:
    timeout = worker.run.config.training.timeout_s
    if timeout and time.monotonic() - worker.started > timeout + GRACE_S and worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
        worker.run.folder.write_status("timed_out", reason=f"killed {GRACE_S:g} s after its {timeout:g} s")
    if worker.process.is_alive():
        return False
    worker.process.join()
    worker.pipe.close()
    code, now = worker.process.exitcode or 0, state(worker.run)
    if code < 0 and now not in RESULTS:
        reason = f"its process was killed ({signal.Signals(-code).name}); the same command continues it"
        worker.run.folder.write_status("interrupted", reason=reason)
    elif now not in (*RESULTS, "failed", "interrupted"):
        worker.run.folder.write_status("failed", reason=f"its process ended with {code}")
    return True


def _work(run: PlannedRun, pipe: Connection, threads: int, gpu: str | None) -> None:
    """The body of a worker process, which sees one GPU where there are any."""
    if gpu is not None and run.config.device in ("auto", "cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    from headwise.attention.kinds import load_plugins
    from headwise.study.fit import train_to_fit
    from headwise.study.revision import train_at

    if run.code is None:
        load_plugins(run.config.plugins)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_stop_with_parent, args=(pipe,), daemon=True).start()
    torch.set_num_threads(threads)
    folder = run.folder
    try:
        train_to_fit(run) if run.code is None else train_at(run)
    except HeadwiseError as error:
        folder.write_status("failed", reason=str(error))
    except Exception as error:
        folder.write_status("failed", reason=f"{type(error).__name__}: {error}")
        folder.say(traceback.format_exc())


def _stop_with_parent(pipe: Connection) -> None:
    try:
        pipe.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
