"""A verb of a notebook in its own process: `python -m headwise.notebook.verbs FOLDER VERB …`.

Its folder holds `log.txt`, the output of the verb, and `result.json`, written when the verb has ended. The
process stops when the pipe to its standard input closes; that also happens when the notebook's process is
killed. A lock prevents two processes from running one verb. The state of a verb follows from its folder
alone.
"""

from __future__ import annotations

import fcntl
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, TypedDict

from msgspec import Meta

from headwise import reading
from headwise.files import alone, write_json
from headwise.runs.folder import known_format

FORMAT = 1
LOCK = ".lock"
TAIL = 1 << 14
LINES = 20
GRACE_S = 60.0


class Ended(TypedDict):
    """`result.json`: the exit code and the duration in seconds."""

    code: Annotated[int, Meta(ge=-(2**15), le=2**15)]
    seconds: float


def result_of(folder: Path) -> Ended | None:
    """The result of a verb; None if it has not ended.

    Raises:
        HeadwiseError: the file is damaged, or was written by a newer headwise.
    """
    path = folder / "result.json"
    try:
        found: Ended = reading.read_json(path, Ended, accept=known_format(path, known=FORMAT))
        return found
    except reading.Missing:
        return None
    except reading.Unreadable as error:
        raise error.so("delete the file; the verb then runs again") from error


def state_of_verb(folder: Path) -> str:
    """The state of a verb, one of `headwise.runs.folder.STATES`."""
    if (ended := result_of(folder)) is not None:
        return "finished" if ended["code"] == 0 else "failed"
    if not (folder / "log.txt").exists():
        return "planned"
    return "running" if _held(folder / LOCK) else "interrupted"


def tail(folder: Path) -> str:
    """The last lines that a verb printed, without control sequences of a terminal."""
    try:
        with reading.opened(folder / "log.txt") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            text = file.read(TAIL).decode("utf-8", "replace")
    except reading.Unreadable:
        return ""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r\n", "\n"))
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    shown = ["".join(c for c in line if c.isprintable() or c == "\t")[:400] for line in lines if line]
    return "\n".join(shown[-LINES:])


def run_verb(folder: Path, verb: str, words: Sequence[str], show: Callable[[], None]) -> bool:
    """Run a verb to its end; returns False if Ctrl-C stopped it.

    Args:
        show: called a few times a second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "headwise.notebook.verbs", str(folder), verb, *words]
    left = _held(folder / LOCK)  # by a verb of a notebook that was killed: it still writes
    with (folder / "log.txt").open("ab" if left else "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        while process.poll() is None:
            show()
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    except KeyboardInterrupt:
        return False
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if result_of(folder) is None and process.returncode > 0:  # it ended before it began
        write_json(folder / "result.json", {"code": process.returncode, "seconds": 0.0, "format": FORMAT})
    return True


def _held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _work(folder: Path, arguments: list[str]) -> int:
    """The body of the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    began = time.monotonic()
    with alone(folder / LOCK, "runs this verb", wait=True):
        if (ended := result_of(folder)) is not None:  # by a process that the last notebook left
            return ended["code"]
        sys.argv = ["headwise", *arguments]
        try:
            runpy.run_module("headwise.cli.main", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        if code != 130:  # stopped: it goes on with the next start
            seconds = round(time.monotonic() - began, 3)
            write_json(folder / "result.json", {"code": code, "seconds": seconds, "format": FORMAT})
    return code


def _stop_with_parent() -> None:
    with suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(_work(Path(sys.argv[1]), sys.argv[2:]))
