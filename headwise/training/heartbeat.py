"""A sign of life in status.json, from a thread of its own: compiling, a long evaluation or a slow disk
do not make a run look dead."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from headwise.errors import HeadwiseError
from headwise.runs.folder import HEARTBEAT_S, Outdated, RunFolder


@contextmanager
def beating(
    folder: RunFolder, about: Callable[[], dict[str, Any]], every_s: float = HEARTBEAT_S
) -> Iterator[None]:
    """Inside, the folder's status is rewritten as running every `every_s` seconds, with what `about` says."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every_s):
            try:
                folder.write_status("running", **about())
            except Outdated:  # the run is another worker's now: end after this step, without a checkpoint
                os.kill(os.getpid(), signal.SIGTERM)
                return
            except (HeadwiseError, OSError):  # a full disk: the run meets it too, and is the one to say so
                continue

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
