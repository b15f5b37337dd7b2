"""Fetches a copy into a new folder, which appears complete and verified, or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.files import alone, must_be_folder, sweep, writing
from headwise.names import place_inside
from headwise.reading.opening import size_of
from headwise.runs import copies
from headwise.runs.folder import BEGINNING, RunFolder
from headwise.runs.manifest import FileOfCopy, Manifest
from headwise.runs.remote import Store, open_store
from headwise.runs.transfer import SILENT, Copy, Progress, copy_of, digest_of, needed


def pull(source: str | Path, folder: str | Path, *, progress: Progress = SILENT) -> Copy:
    """Fetch a copy into `folder`, which appears complete and verified, or not at all.

    The folder of a run that was planned and never started is replaced.

    Raises:
        HeadwiseError: there is no complete copy, a file of it is damaged, `folder` is not empty, the disk is
            full, or the store cannot be reached.
    """
    store, folder = open_store(source), Path(folder)
    must_be_folder(folder)
    _refuse_taken(folder)
    whole = folder.absolute()
    partial = whole.with_name(f".{whole.name[:100]}.pull")
    manifest = needed(store)
    with alone(whole.with_name(f"{partial.name}.lock"), f"pulls into {folder}"), writing(folder):
        partial.mkdir(parents=True, exist_ok=True)
        try:
            copy = _fetch(store, manifest, partial, progress)
            _take_place(partial, whole)
        finally:
            with suppress(OSError):  # not empty: the next pull continues it
                partial.rmdir()
    return copy


def _fetch(store: Store, manifest: Manifest, folder: Path, progress: Progress) -> Copy:
    """Fetch a copy into a hidden folder, and delete the files there that do not belong to the copy."""
    inside = [(name, store.below(name)) for name in manifest["runs"]]
    nested = [(name, at, needed(at)) for name, at in inside]
    if any(run["kind"] != "run" for _, _, run in nested):
        raise HeadwiseError(f"the manifest of {store.url} is damaged: it lists a folder of runs as a run")
    moved = 0
    size = sum(file["size"] for file in manifest["files"])
    everything = size + sum(file["size"] for _, _, run in nested for file in run["files"])
    if (free := shutil.disk_usage(folder).free) < everything:
        raise HeadwiseError(
            f"{store.url} has {size_of(everything)}, but only {size_of(free)} are free in {folder.parent}"
        )
    progress.begin(f"fetching {store.url}", size)
    expected = {file["name"] for file in manifest["files"]}
    for file in manifest["files"]:
        moved += _fetch_file(store, file, folder, progress.count)
    runs = []
    for name, at, run in nested:
        place = place_inside(folder, name, store.url)
        place.mkdir(parents=True, exist_ok=True)
        runs.append(_fetch(at, run, place, progress))
    _delete_others(folder, expected, tuple(manifest["runs"]))
    copies.record(folder, store, manifest)
    return copy_of(store, manifest, moved, tuple(runs))


def _fetch_file(store: Store, file: FileOfCopy, folder: Path, counted: Callable[[int], None]) -> int:
    """Fetch one file unless it is already here; returns the bytes fetched."""
    place = place_inside(folder, file["name"], store.url)
    if place.is_file() and digest_of(place) == (file["size"], file["sha256"]):
        counted(file["size"])
        return 0
    place.parent.mkdir(parents=True, exist_ok=True)
    draft, digest, size = place.with_name(".pulled"), hashlib.sha256(), 0
    with draft.open("wb") as out:
        for chunk in store.chunks(file["name"], limit=file["size"]):
            digest.update(chunk)
            size += len(chunk)
            out.write(chunk)
            counted(len(chunk))
        out.flush()
        os.fsync(out.fileno())
    if (size, digest.hexdigest()) != (file["size"], file["sha256"]):
        draft.unlink()
        raise HeadwiseError(
            f"{file['name']} of {store.url} is damaged: its SHA-256 differs from the manifest's"
        )
    os.replace(draft, place)
    return size


def _delete_others(folder: Path, expected: set[str], runs: tuple[str, ...]) -> None:
    """Delete files of an earlier pull that do not belong to this copy."""
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if name in expected or any(name == run or name.startswith(f"{run}/") for run in runs):
            continue
        if not path.is_dir() or path.is_symlink():
            path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()


def _take_place(partial: Path, folder: Path) -> None:
    if folder.is_dir():
        _refuse_taken(folder)
        sweep(folder)
        for name in BEGINNING:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    os.replace(partial, folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_taken(folder: Path) -> None:
    if os.path.lexists(folder) and (not folder.is_dir() or folder.is_symlink() or any(folder.iterdir())):
        RunFolder(folder).refuse_taken()  # a planned run may lie there
