"""Deletes runs, but never the only copy of weights unless the user requests it.

All deletion of run folders goes through this module: `delete` for a user, `discard` for a run that has no
weights yet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.files import is_draft, remove_folder, shortened
from headwise.runs import copies
from headwise.runs.folder import RunFolder, state_of
from headwise.runs.index import listed
from headwise.runs.manifest import COPIES, Manifest, is_weights
from headwise.runs.read import Run, find_runs
from headwise.runs.remote import Store, open_store
from headwise.runs.store import SILENT, Progress, digest_of, verify


@dataclass(frozen=True)
class Doomed:
    """A run that may be deleted.

    Attributes:
        path: its folder.
        n_weights, size: the number of files of weights, and the bytes of all files in the folder.
        copy: the URL of a copy that holds the weights and was just read back; None if the run has no weights,
            or if their only copy may be deleted.
    """

    path: Path
    n_weights: int
    size: int
    copy: str | None


def weights_in(folder: Path) -> list[str]:
    """The names of the files of weights in a folder, including hidden ones, without drafts."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_draft(name)]
        for name in names:
            inside = os.path.relpath(os.path.join(parent, name), folder)
            if is_weights(inside):
                found.append(inside)
    return sorted(found)


def may_delete(
    folders: Sequence[str | Path],
    *,
    only_copy: bool = False,
    although_used: bool = False,
    roots: Sequence[Path] = (),
    progress: Progress = SILENT,
) -> list[Doomed]:
    """Check that runs may be deleted, without deleting anything.

    Args:
        only_copy: also allow weights that exist nowhere else.
        although_used: also allow runs from which other runs start.
        roots: folders that are searched for such other runs; by default `runs` and the folders that hold the
            runs.

    Raises:
        HeadwiseError: a folder is not a run, or the run is running; other runs start from it; or no verified
            copy holds its weights. The message names the first such run.
    """
    paths = [_run_folder(folder) for folder in folders]
    if not although_used:
        usual = [Path("runs"), *(path.parent for path in paths)]
        _refuse_used(paths, roots or [root for root in usual if root.is_dir()])
    return [_checked(path, paths, only_copy, progress) for path in dict.fromkeys(paths)]


def delete(run: Doomed) -> None:
    """Delete a run that was checked.

    Raises:
        HeadwiseError: the system refuses it; the run is then still complete.
    """
    remove_folder(run.path)
    if os.path.lexists(run.path):
        raise HeadwiseError(f"{run.path} could not be deleted: the folder that holds it is not writable")


def discard(folder: Path) -> None:
    """Delete the folder of a run that never completed a step, except status.json, which numbers its worker.

    Raises:
        HeadwiseError: it contains weights, and no verified copy holds them.
    """
    if weights_in(folder):
        held_elsewhere(folder)
    config = RunFolder(folder).config  # last: without it, other files would be no run
    inside = folder.iterdir() if folder.is_dir() else ()
    for path in sorted(inside, key=lambda path: path == config):
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        elif path.name != "status.json":
            path.unlink(missing_ok=True)


def held_elsewhere(folder: Path, doomed: Sequence[Path] = (), *, progress: Progress = SILENT) -> str:
    """The URL of a copy that holds every file of weights of a run; the copy is read back first.

    Args:
        doomed: folders that will be deleted; a copy inside one of them does not count.

    Raises:
        HeadwiseError: there is no such copy; the message has the fault of each recorded copy.
    """
    names = weights_in(folder)
    faults = []
    for known in reversed(copies.known(folder)):
        try:
            store = open_store(known["url"])
            _refuse_same_place(store, [folder, *doomed])
            _refuse_other_weights(folder, names, verify(store, progress=progress), store)
            return store.url
        except HeadwiseError as error:
            faults.append(str(error))
    about = "; ".join(faults) or f"no copy is recorded in its {COPIES}"
    raise HeadwiseError(
        f"{folder} holds the only copy of {len(names)} file{'s' * (len(names) != 1)} of weights: {about}"
    )


def _checked(path: Path, paths: Sequence[Path], only_copy: bool, progress: Progress) -> Doomed:
    names = weights_in(path)
    copy = None
    if names and not only_copy:
        try:
            copy = held_elsewhere(path, paths, progress=progress)
        except HeadwiseError as error:
            raise HeadwiseError(
                f"{error}; `headwise runs push` copies it, and --only-copy deletes it nevertheless"
            ) from error
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    return Doomed(path, len(names), size, copy)


def _run_folder(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_symlink():
        raise HeadwiseError(f"{shortened(folder)} is a link; give the folder that it points to")
    path = Path(os.path.realpath(path))
    if not path.is_dir():
        raise HeadwiseError(f"{shortened(folder)} is not a folder; give the folder of a run")
    if [run.path for run in find_runs(path)] != [path]:
        raise HeadwiseError(
            f"{shortened(folder)} is not a run: it has no status.json; give the folders of the runs "
            "themselves"
        )
    status = RunFolder(path).read_status()
    if state_of(status) == "running":
        raise HeadwiseError(
            f"{path} is running (process {status.get('pid')} on {status.get('host')}); stop it first"
        )
    return path


def _refuse_used(doomed: Sequence[Path], roots: Sequence[Path]) -> None:
    others = {os.path.realpath(run.path): run for root in roots for run in listed(root)}
    for place, run in others.items():
        source = _source(run)
        if source is None or Path(place) in doomed:
            continue
        used = next((path for path in doomed if source.is_relative_to(path)), None)
        if used is not None:
            raise HeadwiseError(
                f"{place} starts from {used} (init_from) and cannot be repeated without it; --although-used "
                "deletes it nevertheless"
            )


def _source(run: Run) -> Path | None:
    """The folder or file that a run starts from, if it is on this machine."""
    named = run.facts.get("init_from")
    return Path(os.path.realpath(named)) if isinstance(named, str) and "://" not in named else None


def _refuse_same_place(store: Store, folders: Sequence[Path]) -> None:
    if not store.lasting:
        raise HeadwiseError(f"{store.url} exists only as long as its process")
    if store.folder is not None:
        place = Path(os.path.realpath(store.folder))
        if any(place.is_relative_to(folder) for folder in folders):
            raise HeadwiseError(f"{store.url} lies inside a folder that is to be deleted")


def _refuse_other_weights(folder: Path, names: Sequence[str], manifest: Manifest, store: Store) -> None:
    there = {file["name"]: (file["size"], file["sha256"]) for file in manifest["files"]}
    for name in names:
        if there.get(name) != digest_of(folder / name):
            raise HeadwiseError(f"{store.url} has no {name}, or a different one")
        copy = None if store.folder is None else store.folder / name
        if copy is not None and os.path.samefile(copy, folder / name):
            raise HeadwiseError(f"{copy} is a link to the run's own file")
