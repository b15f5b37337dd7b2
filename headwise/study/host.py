"""What a cluster runs on a node for one run: the worker's process, watched as the local executor watches it.

The training runs in a process of its own, so that it outlives for a moment what the cluster kills: the pipe
to it closes, and it finishes its step and saves.
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
"""Seconds that a shared file system may take to show what another machine wrote."""


def host(parcel: Parcel, home: str, threads: int, gpus: int) -> tuple[str, str, bool]:
    """Work on a run until it ends, or until KeyboardInterrupt asks to save and end.

    Args:
        parcel: the run, with the number of its attempt.
        home: the folder that relative paths of the run begin at; on shared storage.
        threads: of each process.
        gpus: of those that the cluster lets this process see; several make as many processes.

    Returns:
        The state, the reason, and whether it was stopped from outside: for the folder where it does not say.
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
    except BaseException as error:  # whatever the cluster raises here to end the task
        stop([worker])
        if not isinstance(error, KeyboardInterrupt):
            raise
        return "interrupted", "stopped before its first step", True


def _refuse_elsewhere(parcel: Parcel, home: str) -> None:
    """Refuse a node that does not see the folders of the machine that the study was started on.

    Raises:
        HeadwiseError: that is so; names the node.
    """
    ends = time.monotonic() + SEEN_S
    while True:
        if os.path.isdir(home):
            os.chdir(home)
            if (parcel.folder.read_status().get("attempt") or 0) >= (parcel.folder.attempt or 0):
                return
        if time.monotonic() > ends:
            raise HeadwiseError(
                f"node {socket.gethostname()} does not see {os.path.join(home, parcel.folder.path)} as the "
                "machine that started the study does; put the study on storage that all nodes share"
            )
        time.sleep(0.1)
