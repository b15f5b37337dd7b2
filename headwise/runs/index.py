"""A cache for lists of runs: `.headwise-index` in the folder that is listed.

It may be deleted at any time. An entry is valid while the run's files are unchanged: inode, size, time of
change and time of modification. The state of a run is determined anew for each list, so that a run whose
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
"""The most bytes of an entry; runs with larger entries are read each time."""

FILES = ("status.json", "summary.json", "config.yaml", "env.json", "metrics.csv")
SETTLED_S = 2.0
"""Runs whose files changed more recently are not cached: a further change could have the same time."""

LEAST = 50
"""The index is written once so many runs were read anew; shorter lists are as fast without it."""


class _Entry(msgspec.Struct, array_like=True, frozen=True):
    """A run: the stamps of its files, and its `_Body` as bytes."""

    stamps: Annotated[list[int], msgspec.Meta(max_length=4 * len(FILES))]
    body: bytes


class _Body(msgspec.Struct, array_like=True, frozen=True):
    """The data for lists; None for a file that cannot be read, with the reason in `problem`."""

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
    """Every run at or below `root`, as from `find_runs`, with the data for lists already read.

    Args:
        least: write the index if at least so many runs were read anew.
        settled_s: seconds for which a run's files must be unchanged before it enters the index.
        told: called with the number of runs read and the number of all runs.
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
    """Disable the garbage collector, which would traverse all runs again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _stamps(place: str) -> list[int]:
    """Four numbers per file, 0 for a missing file."""
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
    """Give a run the data of an entry; False if the entry is damaged."""
    try:
        body = _Decoders.body.decode(entry.body)
    except msgspec.MsgspecError:
        return False
    known = {"status": body.status, "summary": body.summary, "facts": body.facts, "problem": body.problem}
    for name, value in known.items():
        if value is not None or name == "problem":
            vars(run)[name] = value  # the run's own cache
    return True


def _entry(run: Run, stamps: list[int], settled_s: float) -> _Entry | None:
    """Read a run; None if its entry cannot be cached."""
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
    """The entries of an index, by path below `root`; empty if the index is missing or damaged."""
    with suppress(reading.Unreadable, msgspec.MsgspecError):
        content = reading.read_bytes(root / INDEX, limit=LIMIT)
        if content.startswith(FORMAT):
            return _Decoders.runs.decode(content[len(FORMAT) :])
    return {}


def _write(root: Path, entries: dict[str, _Entry]) -> None:
    with suppress(HeadwiseError, OSError), replacing(root / INDEX) as draft:  # a read-only folder
        draft.write_bytes(FORMAT + msgspec.msgpack.encode(entries))
