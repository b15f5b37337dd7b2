"""Executes runs on a Ray cluster: each run is a task with its processors, GPUs and memory.

Ray places tasks on nodes and reports lost nodes. A task watches the run's own process on its node
(`headwise.study.host`); with several GPUs torchrun starts the run, because Ray places a whole task on one
node. The result of a run is in its folder, which all nodes share.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray import exceptions

from headwise.errors import HeadwiseError
from headwise.runs.folder import RESULTS, RunFolder
from headwise.study.executor import Ending, Parcel, Resources, parcel
from headwise.study.host import host
from headwise.study.local import GRACE_S

if TYPE_CHECKING:
    from headwise.study.plan import PlannedRun

LOST = (
    exceptions.NodeDiedError, exceptions.WorkerCrashedError, exceptions.LocalRayletDiedError,
    exceptions.ObjectLostError, exceptions.RaySystemError, exceptions.TaskUnschedulableError,
)  # fmt: skip
"""The errors of Ray for a task whose node, or whose process on the node, is lost."""

CONNECT_S = 10.0
"""Seconds until a cluster must accept a connection."""

SLOTS_S = 5.0
"""Seconds between two queries of the cluster's resources."""

QUEUED = 2
"""Tasks that are queued in advance, so that a node never waits for the driver."""

HEADROOM = 1.25
"""Requested memory as a multiple of the peak of another seed of the variant."""


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this program's handler of SIGTERM, which Ray replaces by one that ends the program."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class Ray:
    """The executor on a Ray cluster.

    Args:
        address: the address of the cluster; None for that of RAY_ADDRESS, else the cluster of this machine,
            else a new one here.
        resources: the resources of each run.

    Raises:
        HeadwiseError: no cluster answers at that address, or no node has the resources of a run.
    """

    def __init__(self, address: str | None, resources: Resources) -> None:
        if address and "://" in address:
            raise HeadwiseError(
                f"--address {address} is the address of a Ray client; start the command on a node of the "
                "cluster, with --address HOST:PORT or --address auto"
            )
        self.resources = resources
        _refuse_silent(address)
        try:
            if not ray.is_initialized():
                with _own_sigterm():
                    ray.init(address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise HeadwiseError(
                f"no Ray cluster answers at {address or 'the default address'}: {reason}"
            ) from None
        self._home = os.getcwd()
        self._tasks: dict[Any, PlannedRun] = {}
        self._ended: list[Ending] = []
        self._slots, self._asked = 0, -math.inf
        self._refuse_infeasible()
        self._remote = ray.remote(task_body)

    def room(self) -> bool:
        """Whether the cluster can execute one more run, or fewer than `QUEUED` tasks are waiting."""
        if time.monotonic() - self._asked > SLOTS_S:
            self._slots, self._asked = self._places(), time.monotonic()
        most = self._slots + QUEUED
        return len(self._tasks) < min(most, self.resources.workers or most)

    def submit(self, run: PlannedRun) -> None:
        """Queue a task."""
        needs: dict[str, Any] = {"num_cpus": self.resources.cpus, "num_gpus": self.resources.gpus}
        if need := memory_need(run):
            largest = max((node.get("memory", 0) for node in self._nodes()), default=0)
            needs["memory"] = int(min(need, largest))
        task = self._remote.options(max_retries=0, name=str(run.folder.path), **needs)
        reference = task.remote(parcel(run), self._home, self.resources.threads, self.resources.gpus)
        self._tasks[reference] = run

    def poll(self, wait_s: float) -> list[Ending]:
        """The runs whose tasks ended or were lost with their node."""
        found, self._ended = self._ended, []
        if self._tasks:
            ray.wait(list(self._tasks), timeout=wait_s)
            ready, _ = ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
            found += [self._ending(task) for task in ready]
        return found

    def stop(self) -> None:
        """Cancel queued tasks, let executing ones save, and leave no task in the cluster."""
        for task in self._tasks:
            ray.cancel(task, force=False)
        tasks = list(self._tasks)
        try:
            if tasks:
                ray.wait(tasks, num_returns=len(tasks), timeout=GRACE_S + 10)
        finally:
            for task in tasks:
                ray.cancel(task, force=True)
        ended = [self._ending(task) for task in tasks]
        self._ended += [one for one in ended if one.run.folder.read_status().get("pid") is not None]

    def _ending(self, task: Any) -> Ending:
        run = self._tasks.pop(task)
        try:
            state, reason, _ = ray.get(task, timeout=1)
            return Ending(run, state, reason)
        except LOST as error:
            name = type(error).__name__
            return Ending(
                run, "interrupted", f"its node was lost ({name}); the same command continues it", True
            )
        except exceptions.OutOfMemoryError:
            return Ending(run, "interrupted", "its node ran out of memory; the same command continues it")
        except (exceptions.TaskCancelledError, exceptions.GetTimeoutError):
            return Ending(run, "interrupted", "stopped; the same command continues it")
        except Exception as error:  # of the task, such as a package that the node lacks
            lines = [line for line in str(error).splitlines() if line.strip()]
            return Ending(run, "failed", f"{type(error).__name__}: {lines[-1][:300] if lines else ''}")

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def _places(self) -> int:
        """The number of runs that fit into the cluster at a time."""
        needs = {"CPU": self.resources.cpus, "GPU": self.resources.gpus}
        return sum(
            min(int(node.get(name, 0) // need) for name, need in needs.items() if need)
            for node in self._nodes()
        )

    def _refuse_infeasible(self) -> None:
        if self._places() == 0:
            have = "; ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in self._nodes())
            raise HeadwiseError(
                f"a run needs {self.resources.cpus} CPUs and {self.resources.gpus} GPUs on one node, but the "
                f"nodes of the Ray cluster have {have or 'none'}; change --cpus-per-run or --gpus-per-run"
            )


def _refuse_silent(address: str | None) -> None:
    """Refuse an address at which nothing listens: Ray itself would retry for minutes.

    Raises:
        HeadwiseError: no connection within `CONNECT_S`, or the address is not HOST:PORT.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address or "://" in address or address in ("auto", "local"):
        return
    host_name, _, port = address.rpartition(":")
    if not host_name or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise HeadwiseError(f"{address[:80]!r} is not the address of a Ray cluster; give HOST:PORT or auto")
    try:
        socket.create_connection((host_name.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HeadwiseError(f"no Ray cluster answers at {address}: {reason}") from error


def task_body(parcel: Parcel, home: str, threads: int, gpus: int) -> tuple[str, str, bool]:
    """The body of a task. Ray cancels it by SIGINT, which is ignored in a cluster that a script started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return host(parcel, home, threads, gpus)


def memory_need(run: PlannedRun) -> int | None:
    """The main memory that a run needs, in bytes; None if it is not known.

    It is the study's `memory_limit` on a CPU, otherwise `HEADROOM` times the largest peak of finished runs of
    other seeds.
    """
    if run.fit.limit is not None and run.config.device == "cpu":
        return run.fit.limit
    peaks = []
    for path in run.folder.path.parent.glob("seed_*"):
        other = RunFolder(path)
        if other.summary.is_file() and other.read_status()["state"] in RESULTS:
            peaks.append(other.read_summary().get("peak_rss_mb") or 0)
    return int(HEADROOM * max(peaks) * 1e6) if any(peaks) else None
