"""Deleting runs, never the only copy of weights unless that is asked for.

Whatever in headwise deletes a run's folder does it here: `delete` for a user, `discard` for a run that has no
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
        n_weights, size: files of weights, and bytes of everything in the folder.
        copy: URL of a copy that was read back just now and holds the weights; None where there are none, or
            where their only copy may go.
    """

    path: Path
    n_weights: int
    size: int
    copy: str | None


def weights_in(folder: Path) -> list[str]:
    """Files of weights in a folder, hidden ones too, by name; drafts are left out."""
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
    """Check that runs may be deleted, and delete nothing.

    Args:
        only_copy: also weights that exist nowhere else.
        although_used: also runs that others start from.
        roots: where those others are looked for; if none is given, in `runs` and beside the runs.

    Raises:
        HeadwiseError: a folder is no run, or its run is running; other runs start from it; or no verified
            copy holds its weights. Names the first.
    """
    paths = [_run_folder(folder) for folder in folders]
    if not although_used:
        usual = [Path("runs"), *(path.parent for path in paths)]
        _refuse_used(paths, roots or [root for root in usual if root.is_dir()])
    return [_checked(path, paths, only_copy, progress) for path in dict.fromkeys(paths)]


def delete(run: Doomed) -> None:
    """Delete a run that was checked.

    Raises:
        HeadwiseError: the system refuses it; the run is whole then.
    """
    remove_folder(run.path)
    if os.path.lexists(run.path):
        raise HeadwiseError(f"{run.path} could not be deleted: its folder cannot be written to")


def discard(folder: Path) -> None:
    """Delete what a run left that never took a whole step, except status.json, which numbers its worker.

    Raises:
        HeadwiseError: there are weights in it, and no verified copy holds them.
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
    """The URL of a copy that holds every file of weights of a run: it is read back now.

    Args:
        doomed: folders that will be deleted, so that a copy inside does not count.

    Raises:
        HeadwiseError: there is none; says what is wrong with each.
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
    raise HeadwiseError(f"{folder} holds the only copy of {len(names)} files of weights: {about}")


def _checked(path: Path, paths: Sequence[Path], only_copy: bool, progress: Progress) -> Doomed:
    names = weights_in(path)
    copy = None
    if names and not only_copy:
        try:
            copy = held_elsewhere(path, paths, progress=progress)
        except HeadwiseError as error:
            raise HeadwiseError(
                f"{error}; `headwise runs push` copies it, and --only-copy deletes it all the same"
            ) from error
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    return Doomed(path, len(names), size, copy)


def _run_folder(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_symlink():
        raise HeadwiseError(f"{shortened(folder)} is a link; name the folder that it leads to")
    path = Path(os.path.realpath(path))
    if not path.is_dir():
        raise HeadwiseError(f"no folder {shortened(folder)} to delete; give a run's folder")
    if [run.path for run in find_runs(path)] != [path]:
        raise HeadwiseError(f"{shortened(folder)} is no run: a run has a status.json; name its runs")
    status = RunFolder(path).read_status()
    if state_of(status) == "running":
        raise HeadwiseError(
            f"{path} is running (process {status.get('pid')} of {status.get('host')}); stop it first"
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
                f"{place} starts from {used} (init_from), and cannot be started again without it; "
                "--although-used deletes it all the same"
            )


def _source(run: Run) -> Path | None:
    """The folder or file that a run starts from, if it is on this machine."""
    named = run.facts.get("init_from")
    return Path(os.path.realpath(named)) if isinstance(named, str) and "://" not in named else None


def _refuse_same_place(store: Store, folders: Sequence[Path]) -> None:
    if not store.lasting:
        raise HeadwiseError(f"{store.url} ends with a process")
    if store.folder is not None:
        place = Path(os.path.realpath(store.folder))
        if any(place.is_relative_to(folder) for folder in folders):
            raise HeadwiseError(f"{store.url} lies in what is to be deleted")


def _refuse_other_weights(folder: Path, names: Sequence[str], manifest: Manifest, store: Store) -> None:
    there = {file["name"]: (file["size"], file["sha256"]) for file in manifest["files"]}
    for name in names:
        if there.get(name) != digest_of(folder / name):
            raise HeadwiseError(f"{store.url} holds no {name}, or another")
        copy = None if store.folder is None else store.folder / name
        if copy is not None and os.path.samefile(copy, folder / name):
            raise HeadwiseError(f"{copy} is a link to the run's own file")
