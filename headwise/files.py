"""Files and folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError

DRAFT = ".draft"
"""Ends the name of the hidden folder that a file is written in before it takes its place."""

NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this disk or user may have",
}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; when the block succeeds, it takes the place of `path`.

    The block creates a file or a folder at the yielded path. When the block fails, nothing of
    it remains and `path` is as it was.

    Raises:
        HeadwiseError: the disk, or what the user may have of it, is full.
    """
    path = Path(path)
    holder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=DRAFT, dir=path.parent))
        draft = holder / path.name
        yield draft
        _sync(draft)
        if draft.is_dir() and path.is_dir():
            path.rename(holder / "replaced")  # a folder cannot be renamed over a full one
        os.replace(draft, path)
        _sync_folder(path.parent)
    except OSError as error:
        refuse_full_disk(path, error)
        raise
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)


def refuse_full_disk(path: Path, error: OSError) -> None:
    """Turn an error for want of space into the user's.

    Raises:
        HeadwiseError: that is what `error` is.
    """
    if error.errno in NO_ROOM:
        raise HeadwiseError(
            f"{NO_ROOM[error.errno]}: {path} was not written; free space there, "
            "what was finished before is kept"
        ) from error


def must_be_folder(path: str | Path, flag: str = "--out") -> None:
    """Refuse a folder to write to that cannot be one, before any work is done for it.

    Raises:
        HeadwiseError: it, or what it would lie in, is a file.
    """
    for place in (Path(path), *Path(path).parents):
        if place.exists():
            if not place.is_dir():
                raise HeadwiseError(f"{flag} {path} cannot be a folder: {place} is a file; give another")
            return


def sweep(folder: str | Path) -> None:
    """Delete what killed writers left below `folder`; for when nobody else writes there."""
    for draft in list(Path(folder).rglob(f".*{DRAFT}")):
        shutil.rmtree(draft, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=True) + "\n")


def _sync(draft: Path) -> None:
    files = [draft] if draft.is_file() else [p for p in draft.rglob("*") if p.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
