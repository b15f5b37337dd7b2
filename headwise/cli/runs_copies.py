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
    "a path, hf://USER/NAME[/path] for a repository of the Hugging Face hub (created as a private one if it "
    "does not exist), or any URL that fsspec supports, such as s3://bucket/path"
)


def push(argv: list[str]) -> int:
    """Copy runs to a store."""
    parser = argparse.ArgumentParser(
        prog="headwise runs push",
        description="Copy a run, or a folder of runs, and verify the copy: every file is read back (of large "
        "files the hub returns the SHA-256), and the manifest is written last. The same command continues an "
        "interrupted push, and updates the copy of a run that has been continued. A target that holds "
        "another run is refused. Several runs keep their paths relative to their common folder.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, or a folder of runs, such as a study's"
    )
    parser.add_argument("target", metavar="TARGET", help=PLACES)
    parser.add_argument(
        "--snapshot", action="store_true", help="push a run that is still running, in its present state"
    )
    args = parser.parse_args(argv)

    from headwise.runs.store import push as copy_to

    runs = list(dict.fromkeys(os.path.realpath(run) for run in args.runs))
    shared = os.path.commonpath([os.path.dirname(run) for run in runs])
    for run in runs:
        inside = os.path.relpath(run, shared)
        target = f"{args.target.rstrip('/')}/{inside}" if len(runs) > 1 else args.target
        with _Shown() as shown:
            copy = copy_to(run, target, snapshot=args.snapshot, progress=shown)
        kept = "" if copy.lasting else "; the store is lost when this process ends"
        print(f"{_what(copy)} verified at {copy.url}, {size_of(copy.moved)} written now{kept}")
    return 0


def pull(argv: list[str]) -> int:
    """Fetch a copy from a store."""
    parser = argparse.ArgumentParser(
        prog="headwise runs pull",
        description="Fetch a run, or a folder of runs, that was pushed. Its folder appears complete and "
        "verified, or not at all; the same command continues an interrupted pull.",
    )
    parser.add_argument("source", metavar="SOURCE", help=PLACES)
    parser.add_argument(
        "--out", metavar="DIR", help="a new folder (default: runs/ followed by the last part of SOURCE)"
    )
    args = parser.parse_args(argv)

    from headwise.runs.store import pull as fetch

    out = args.out or Path(
        "runs", folder_name(args.source.rstrip("/").rpartition("/")[2], "SOURCE's last part")
    )
    with _Shown() as shown:
        copy = fetch(args.source, out, progress=shown)
    print(f"{_what(copy)} verified in {out}, {size_of(copy.moved)} fetched now")
    return 0


def delete(argv: list[str]) -> int:
    """Delete runs, but not the only copy of weights unless `--only-copy` is given."""
    parser = argparse.ArgumentParser(
        prog="headwise runs delete",
        description="Delete runs. Three cases are refused before anything is deleted: a run that is running; "
        "a run whose weights exist in no verified copy (its recorded copies are read back now); and a run "
        "from which other runs start (init_from).",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    parser.add_argument(
        "--only-copy", action="store_true", help="also delete weights that exist nowhere else"
    )
    parser.add_argument(
        "--although-used", action="store_true", help="also delete runs from which other runs start"
    )
    parser.add_argument(
        "--root", metavar="DIR", action="append", default=[],
        help="folder to search for runs that start from RUN (default: runs, and the folder that holds RUN)",
    )  # fmt: skip
    args = parser.parse_args(argv)

    from headwise.runs.delete import delete as delete_run
    from headwise.runs.delete import may_delete

    roots = [Path(root) for root in args.root]
    for root in roots:
        if not root.is_dir():
            raise HeadwiseError(f"--root {shortened(root)} is not a folder; give a folder that holds runs")
    with _Shown() as shown:
        doomed = may_delete(
            args.runs, only_copy=args.only_copy, although_used=args.although_used, roots=roots, progress=shown
        )
    for run in doomed:
        weights = f"its weights are also at {run.copy}" if run.copy else "the only copy of its weights"
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
    """Shows progress, rate and time left: one line on a terminal, otherwise a line every ten seconds."""

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
        """Start an action, named `what`, on `total` bytes."""
        self.what, self.total, self.done, self.begun = what, total, 0, time.monotonic()

    def count(self, n_bytes: int) -> None:
        """Add bytes to those that are done."""
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
