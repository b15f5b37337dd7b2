"""A run at another revision: that revision's command line trains it, in its own process and working tree.

What passes between them is what every revision knows: `headwise train --config FILE --out FOLDER [--resume]`,
the run folder, and SIGTERM, on which a run finishes its step, saves and ends as interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import headwise
from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import write_text
from headwise.runs.folder import RESULTS
from headwise.study import entry
from headwise.study.code import PACKAGE, Code, record_revision, worktree

if TYPE_CHECKING:
    from headwise.study.plan import PlannedRun

HERE = Path(headwise.__file__).absolute().parents[1]
"""Where this headwise lies."""
POLL_S = 0.1
SAID = 1 << 16
"""Bytes of a run's last messages that are read."""


def train_at(run: PlannedRun, processes: int = 1) -> None:
    """Train or continue `run` at its revision; its end is in its status.

    Raises:
        HeadwiseError: the revision refused the configuration or cannot run: its message.
    """
    assert run.code is not None
    if processes != 1:
        raise HeadwiseError("a run of another revision has one process; leave --gpus-per-run out, or give 1")
    tree, folder = worktree(run.code), run.folder
    if run.code.has_headwise and not (tree / PACKAGE).is_file():
        raise HeadwiseError(
            f"the revision {run.code.written} has no {PACKAGE}, and others that are compared have"
        )
    with _asked_to_stop() as asked, tempfile.TemporaryFile() as said:
        inside, outside = os.pipe()
        try:
            process = _start(run, run.code, tree, inside, said)
        finally:
            os.close(inside)
        try:
            code = _wait(process, asked)
        finally:
            os.close(outside)  # if this process fails, the run ends at once
        record_revision(folder, run.code)
        status = folder.read_status()
        if status.get("pid") == process.pid and status["state"] in (*RESULTS, "failed", "interrupted"):
            return
        if code < 0 or asked:
            reason = "stopped before its first step" if asked else f"killed ({signal.Signals(-code).name})"
            folder.write_status("interrupted", reason=f"{reason}; the same command continues it")
            return
        raise HeadwiseError(_last_words(said) or f"the revision's process ended with {code}")


def _start(run: PlannedRun, code: Code, tree: Path, alive: int, said: IO[bytes]) -> subprocess.Popen[bytes]:
    assert run.config.out is not None
    given = Path(code.folder, "given", run.variant, f"seed_{run.config.seed}.yaml")
    write_text(given, reading.to_yaml(_nested(code.given)))
    argv = ["train", *(f"--plugins={name}" for name in run.config.plugins)]
    argv += ["--config", str(given), "--out", os.path.abspath(run.config.out)]
    if run.folder.holds_run():
        argv.append("--resume")
    top = os.path.realpath(code.repository)
    order = {
        "argv": argv, "path": _path(top, tree), "repository": top, "alive": alive,
        "allowed": [os.path.realpath(tree), *_environments(top)],
        "exempt": [] if code.has_headwise else ["headwise"],
    }  # fmt: skip
    import torch

    threads = {name: str(torch.get_num_threads()) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | threads
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(entry.__file__).absolute()), json.dumps(order)],
        cwd=_same_place(os.getcwd(), top, tree) or tree, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=said, pass_fds=[alive], start_new_session=True,
    )  # fmt: skip


def _wait(process: subprocess.Popen[bytes], asked: list[int]) -> int:
    """Wait for its end, handing on a request to stop; returns its exit code.

    Nothing is written to the run's folder meanwhile: older revisions do not lock their drafts of files, which
    would be taken for those of a killed process.
    """
    told = False
    while True:
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            if asked and not told:
                process.terminate()
                told = True


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Inside, SIGTERM is noted in the list and does nothing else."""
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _path(top: str, tree: Path) -> list[str]:
    """sys.path of the revision: this process's, with the working tree first and in place of the user's."""
    found = [_same_place(os.getcwd(), top, tree), str(tree)]
    for place in sys.path:
        place = place or os.getcwd()
        found.append(_same_place(place, top, tree) or place)
    return list(dict.fromkeys(place for place in [*found, str(HERE)] if place))


def _same_place(place: str, top: str, tree: Path) -> str | None:
    """The revision's folder at a place of the user's working tree `top`; None where it is not part of it."""
    real = os.path.realpath(place)
    if not _below(real, top) or any(_below(real, one) for one in _environments(top)):
        return None
    found = tree / os.path.relpath(real, top)
    return os.path.normpath(found) if found.is_dir() else None


def _environments(top: str) -> list[str]:
    """Where installed packages lie, as far as that is below `top`."""
    places = [sys.prefix, sys.base_prefix, *site.getsitepackages(), site.getusersitepackages()]
    real = [os.path.realpath(place) for place in places]
    return [place for place in dict.fromkeys(real) if place != top and _below(place, top)]


def _below(place: str, folder: str) -> bool:
    return Path(place).is_relative_to(folder)


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return found


def _last_words(said: IO[bytes]) -> str:
    """What a revision said of its end: its last message, or the last line of its traceback."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - SAID))
    lines = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    messages = [line.removeprefix("headwise: ") for line in lines if line.startswith("headwise: ")]
    return (messages or lines or [""])[-1]
