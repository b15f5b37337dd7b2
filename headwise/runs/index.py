"""A cache of what lists read of runs: `.headwise-index` in the folder that is listed.

It may be deleted at any time. An entry counts while the files that it was read from are the same: inode,
size, time of change and of modification. What a run's state comes to is judged anew each time, so a run whose
process died is not listed as running.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import replacing
from headwise.runs.read import Run, Unreadable, find_runs
from headwise.runs.schemas import Status, Summary

INDEX = ".headwise-index"
FORMAT = b"headwise-index 1\n"
LIMIT = 1 << 30
LARGE = 1 << 15
"""Bytes of an entry that is kept; the largest runs are read each time."""

FILES = ("status.json", "summary.json", "config.yaml", "env.json", "metrics.csv")
SETTLED_S = 2.0
"""Files that changed less long ago may change again within the clock's tick, and are not kept."""

LEAST = 50
"""Runs that were read anew before the index is written: a list of few is as fast without it."""


class _Entry(msgspec.Struct, array_like=True, frozen=True):
    """A run: the stamps of its files, and `_Body` as bytes."""

    stamps: Annotated[list[int], msgspec.Meta(max_length=4 * len(FILES))]
    body: bytes


class _Body(msgspec.Struct, array_like=True, frozen=True):
    """What lists read; None where a file cannot be read, which `problem` tells of."""

    status: Status | None
    summary: Summary | None
    facts: dict[str, Any]
    problem: str | None


class _Decoders:
    runs = msgspec.msgpack.Decoder(dict[str, _Entry])
    body = msgspec.msgpack.Decoder(_Body)


def listed(
    root: str | Path,
    *,
    least: int = LEAST,
    settled_s: float = SETTLED_S,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> list[Run]:
    """Every run at or below `root` as `find_runs` finds it; what a list shows of it has been read.

    Args:
        least: write the index when at least so many runs were read anew.
        settled_s: seconds since a run's files changed last, for it to be kept in the index.
        told: how many runs were read, and of how many.
    """
    with _uncollected():
        return _listed(Path(root), least, settled_s, told)


def place_below(path: Path, root: Path) -> str:
    """`path`, which `find_runs` found, without `root`; thousands a second more than `relative_to`."""
    return str(path)[0 if root == Path() else len(str(root)) :].lstrip("/")  # `.` begins no path


def _listed(root: Path, least: int, settled_s: float, told: Callable[[int, int], None]) -> list[Run]:
    runs = find_runs(root)
    before = _read(root)
    entries: dict[str, _Entry] = {}
    anew = 0
    for number, run in enumerate(runs):
        place = place_below(run.path, root)
        stamps = _stamps(str(run.path))
        entry = before.get(place)
        if entry is None or entry.stamps != stamps or not _fill(run, entry):
            entry, anew = _entry(run, stamps, settled_s), anew + 1
            told(number + 1, len(runs))
        if entry is not None:
            entries[place] = entry
    if anew >= least:
        _write(root, entries)
    return runs


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which would go through all that was read again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _stamps(place: str) -> list[int]:
    """Four numbers a file, 0 where there is none."""
    found: list[int] = []
    for name in FILES:
        try:
            about = os.stat(f"{place}/{name}")
        except OSError:
            found += (0, 0, 0, 0)
        else:
            found += (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    return found


def _fill(run: Run, entry: _Entry) -> bool:
    """Give a run what an entry holds; False where that is damaged."""
    try:
        body = _Decoders.body.decode(entry.body)
    except msgspec.MsgspecError:
        return False
    known = {"status": body.status, "summary": body.summary, "facts": body.facts, "problem": body.problem}
    for name, value in known.items():
        if value is not None or name == "problem":
            vars(run)[name] = value  # where the run itself would keep it
    return True


def _entry(run: Run, stamps: list[int], settled_s: float) -> _Entry | None:
    """Read a run; None where its entry cannot be kept."""
    problem, facts = run.problem, run.facts
    body = _Body(_part(run, "status"), _part(run, "summary"), facts, problem)
    newest = max(max(stamps[2::4]), max(stamps[3::4]))
    if time.time_ns() - newest < settled_s * 1e9:
        return None
    try:
        content = msgspec.msgpack.encode(body)
    except (OverflowError, msgspec.MsgspecError):  # a number of more than 64 bits
        return None
    return _Entry(stamps, content) if len(content) <= LARGE else None


def _part(run: Run, name: str) -> Any:
    try:
        return getattr(run, name)
    except Unreadable:
        return None


def _read(root: Path) -> dict[str, _Entry]:
    """The entries of an index by the place below `root`; none where there is no index, or a damaged one."""
    with suppress(reading.Unreadable, msgspec.MsgspecError):
        content = reading.read_bytes(root / INDEX, limit=LIMIT)
        if content.startswith(FORMAT):
            return _Decoders.runs.decode(content[len(FORMAT) :])
    return {}


def _write(root: Path, entries: dict[str, _Entry]) -> None:
    with suppress(HeadwiseError, OSError), replacing(root / INDEX) as draft:  # a folder that is only read
        draft.write_bytes(FORMAT + msgspec.msgpack.encode(entries))
