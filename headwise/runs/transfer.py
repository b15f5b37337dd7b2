"""Shared parts of pushes and pulls: their progress, their result, and the verification of a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.runs.manifest import MANIFEST, FileOfCopy, Manifest, read_claim, read_manifest
from headwise.runs.remote import CHUNK, Found, Store


class Progress(Protocol):
    """Receives the actions of a transfer, and their progress in bytes."""

    def begin(self, what: str, total: int) -> None:
        """An action, named `what`, starts on `total` bytes."""

    def count(self, n_bytes: int) -> None:
        """Further bytes are done."""


class Silent:
    """Shows nothing."""

    def begin(self, what: str, total: int) -> None:
        """Nothing."""

    def count(self, n_bytes: int) -> None:
        """Nothing."""


SILENT = Silent()


@dataclass(frozen=True)
class Copy:
    """A verified copy.

    Attributes:
        url: its place.
        kind: `run` for one run, `folder` for a folder of runs.
        files, size: the number of files and their bytes, including the runs inside.
        moved: the bytes that were written or fetched now; the others were already there.
        lasting: whether it outlives this process; a copy in memory does not.
        runs: copies of the runs inside.
    """

    url: str
    kind: str
    files: int
    size: int
    moved: int
    lasting: bool = True
    runs: tuple[Copy, ...] = ()


def verify(store: Store, manifest: Manifest | None = None, *, progress: Progress = SILENT) -> Manifest:
    """Read a copy of one run back; returns its manifest.

    Raises:
        HeadwiseError: there is no copy, a file is missing or damaged, or the store cannot be reached.
    """
    manifest = manifest or needed(store)
    there = store.files()
    progress.begin(f"verifying {store.url}", sum(file["size"] for file in manifest["files"]))
    for file in manifest["files"]:
        if not is_there(store, there, file, progress.count):
            raise HeadwiseError(f"{file['name']} of {store.url} is missing or damaged")
    return manifest


def copy_of(store: Store, manifest: Manifest, moved: int, runs: tuple[Copy, ...] = ()) -> Copy:
    """The copy that a manifest describes, with those of the runs inside."""
    size = sum(file["size"] for file in manifest["files"])
    return Copy(
        store.url,
        manifest["kind"],
        len(manifest["files"]) + sum(copy.files for copy in runs),
        size + sum(copy.size for copy in runs),
        moved + sum(copy.moved for copy in runs),
        store.lasting,
        runs,
    )


def is_there(store: Store, there: dict[str, Found], file: FileOfCopy, counted: Callable[[int], None]) -> bool:
    """Whether a store holds a file with the expected bytes."""
    found = there.get(file["name"])
    if found is None or found.size != file["size"]:
        counted(file["size"])
        return False
    return store.digest(file["name"], found, counted) == file["sha256"]


def needed(store: Store) -> Manifest:
    """The manifest of a copy.

    Raises:
        HeadwiseError: there is none.
    """
    manifest = read_manifest(store)
    if manifest is None:
        begun = read_claim(store) is not None
        raise HeadwiseError(
            f"the push to {store.url} is incomplete; run it again, then pull"
            if begun
            else f"{store.url} holds no copy of a run: {MANIFEST} is missing"
        )
    return manifest


def digest_of(path: Path, counted: Callable[[int], None] = lambda _: None) -> tuple[int, str]:
    """Bytes and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with reading.opened(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
            counted(len(chunk))
    return size, digest.hexdigest()
