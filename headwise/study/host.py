"""The process that a cluster starts on a node for one run; it starts the worker and watches it.

The training is a separate process, so that it survives for a moment if the cluster kills this one: the pipe
between them closes, and the worker finishes its step and saves.
"""

from __future__ import annotations

import os
import socket
import time
from multiprocessing.connection import wait

from headwise.errors import HeadwiseError
from headwise.study.executor import Parcel
from headwise.study.local import start, stop, visible_gpus

SEEN_S = 10.0
"""The most seconds until a shared file system shows what another machine wrote."""


def host(parcel: Parcel, home: str, threads: int, gpus: int) -> tuple[str, str, bool]:
    """Execute a run until it ends, or until KeyboardInterrupt, after which it saves and ends.

    Args:
        parcel: the run, with the number of its attempt.
        home: the folder at which relative paths of the run begin; on shared storage.
        threads: the threads of each process.
        gpus: the number of visible GPUs to use; with several, torchrun starts one process per GPU.

    Returns:
        The state and the reason, which count unless the run's folder records its end, and whether the run was
        stopped from outside.
    """
    try:
        _refuse_elsewhere(parcel, home)
    except HeadwiseError as error:
        return "failed", str(error), False
    worker = start(parcel, threads, visible_gpus()[:gpus], processes=max(1, gpus))
    try:
        while True:
            ending = worker.ending()
            if ending is not None:
                return *ending, False
            wait([worker.process.sentinel], 1.0)
    except BaseException as error:  # any exception that the cluster raises here to end the task
        stop([worker])
        if not isinstance(error, KeyboardInterrupt):
            raise
        return "interrupted", "stopped before its first step", True


def _refuse_elsewhere(parcel: Parcel, home: str) -> None:
    """Refuse a node that does not see the same folders as the machine that started the study.

    Raises:
        HeadwiseError: the folders are missing or different; names the node.
    """
    ends = time.monotonic() + SEEN_S
    while True:
        if os.path.isdir(home):
            os.chdir(home)
            if (parcel.folder.read_status().get("attempt") or 0) >= (parcel.folder.attempt or 0):
                return
        if time.monotonic() > ends:
            raise HeadwiseError(
                f"node {socket.gethostname()} does not see {os.path.join(home, parcel.folder.path)} of the "
                "machine that started the study; put the study on storage that all nodes share"
            )
        time.sleep(0.1)
