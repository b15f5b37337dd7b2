"""`headwise runs push`, `pull` and `delete`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.errors import HeadwiseError
from headwise.files import shortened
from headwise.names import folder_name
from headwise.reading.opening import size_of

if TYPE_CHECKING:
    from headwise.runs.store import Copy

PLACES = (
    "a path, hf://USER/NAME[/path] for a repository of the Hugging Face hub (made, and private, where it is "
)
PLACES += "not there), or any URL of fsspec's such as s3://bucket/path"


def push(argv: list[str]) -> int:
    """Copy runs to a store."""
    parser = argparse.ArgumentParser(
        prog="headwise runs push",
        description="Copy a run, or a folder of runs, and verify the copy: every file is read back (the hub "
        "gives its SHA-256 of large ones), and the manifest is written last. The same command continues a "
        "push that was interrupted, and updates the copy of a run that went on. A place that holds another "
        "run is refused. Several runs lie below TARGET as they lie below the folder that they share.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, or one with runs, as a study's"
    )
    parser.add_argument("target", metavar="TARGET", help=PLACES)
    parser.add_argument("--snapshot", action="store_true", help="push a run that is running, as it is now")
    args = parser.parse_args(argv)

    from headwise.runs.store import push as copy_to

    runs = list(dict.fromkeys(os.path.realpath(run) for run in args.runs))
    shared = os.path.commonpath([os.path.dirname(run) for run in runs])
    for run in runs:
        inside = os.path.relpath(run, shared)
        target = f"{args.target.rstrip('/')}/{inside}" if len(runs) > 1 else args.target
        with _Shown() as shown:
            copy = copy_to(run, target, snapshot=args.snapshot, progress=shown)
        kept = "" if copy.lasting else "; it ends with this process"
        print(f"{_what(copy)} verified at {copy.url}, {size_of(copy.moved)} of it written now{kept}")
    return 0


def pull(argv: list[str]) -> int:
    """Fetch a copy from a store."""
    parser = argparse.ArgumentParser(
        prog="headwise runs pull",
        description="Fetch a run, or a folder of runs, that was pushed. Its folder appears whole and "
        "verified, or not at all; the same command continues a pull that was interrupted.",
    )
    parser.add_argument("source", metavar="SOURCE", help=PLACES)
    parser.add_argument(
        "--out", metavar="DIR", help="a new folder (default: runs/ and the last part of SOURCE)"
    )
    args = parser.parse_args(argv)

    from headwise.runs.store import pull as fetch

    out = args.out or Path(
        "runs", folder_name(args.source.rstrip("/").rpartition("/")[2], "SOURCE's last part")
    )
    with _Shown() as shown:
        copy = fetch(args.source, out, progress=shown)
    print(f"{_what(copy)} verified in {out}, {size_of(copy.moved)} of it fetched now")
    return 0


def delete(argv: list[str]) -> int:
    """Delete runs, never the only copy of weights unless that is asked for."""
    parser = argparse.ArgumentParser(
        prog="headwise runs delete",
        description="Delete runs. Refused, before anything is deleted: a run that is running; a run whose "
        "weights no copy holds, which is checked now by reading back the copies that were pushed or pulled; "
        "a run that other runs start from (init_from).",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--only-copy", action="store_true", help="delete weights that exist nowhere else, too"
    )
    parser.add_argument(
        "--although-used", action="store_true", help="delete runs that others start from, too"
    )
    parser.add_argument(
        "--root", metavar="DIR", action="append", default=[],
        help="where to look for runs that start from them (default: runs, and the folder that RUN lies in)",
    )  # fmt: skip
    args = parser.parse_args(argv)

    from headwise.runs.delete import delete as delete_run
    from headwise.runs.delete import may_delete

    roots = [Path(root) for root in args.root]
    for root in roots:
        if not root.is_dir():
            raise HeadwiseError(f"no folder --root {shortened(root)} to look for runs in")
    with _Shown() as shown:
        doomed = may_delete(
            args.runs, only_copy=args.only_copy, although_used=args.although_used, roots=roots, progress=shown
        )
    for run in doomed:
        weights = f"weights are at {run.copy}" if run.copy else "the only copy of its weights"
        print(f"{run.path}: {size_of(run.size)}, {weights if run.n_weights else 'no weights'}")
    if not args.yes and not _agreed(len(doomed)):
        return 1
    for run in doomed:
        delete_run(run)
    print(f"deleted {len(doomed)} run{'s' * (len(doomed) > 1)}")
    return 0


def _agreed(number: int) -> bool:
    if not sys.stdin.isatty():
        raise HeadwiseError("nothing was deleted: pass --yes to delete without being asked")
    try:
        answer = input(f"delete {number} run{'s' * (number > 1)}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() in ("y", "yes"):
        return True
    print("nothing was deleted")
    return False


def _what(copy: Copy) -> str:
    runs = f"{len(copy.runs)} runs, " if copy.kind == "folder" else ""
    return f"{runs}{copy.files:,} files, {size_of(copy.size)}"


class _Shown:
    """What is done, how fast, and the time left: one line on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.every = 0.3 if self.terminal else 10.0
        self.what, self.total, self.done = "", 0, 0
        self.begun = self.shown = time.monotonic()
        self.drawn = False

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: object) -> None:
        if self.drawn and self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def begin(self, what: str, total: int) -> None:
        """`what` begins, of `total` bytes."""
        self.what, self.total, self.done, self.begun = what, total, 0, time.monotonic()

    def count(self, n_bytes: int) -> None:
        """So many more are done."""
        self.done += n_bytes
        now = time.monotonic()
        if now - self.shown < self.every:
            return
        self.shown, self.drawn = now, True
        rate = self.done / max(now - self.begun, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        done = f"{size_of(self.done)} of {size_of(self.total)}, {size_of(int(rate))}/s"
        start, end = ("\r", "\x1b[K") if self.terminal else ("", "\n")
        print(f"{start}{self.what}: {done}, {left:.0f} s left", end=end, file=sys.stderr, flush=True)
