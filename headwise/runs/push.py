"""Verified copies: a push writes the files, reads each of them back, and writes the manifest last."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import DRAFT, shortened
from headwise.runs import copies
from headwise.runs.folder import RESULTS, RunFolder, state_of
from headwise.runs.manifest import (
    CLAIM,
    FORMAT,
    MANIFEST,
    FileOfCopy,
    LocalFile,
    Manifest,
    checkpoint_step,
    files_of,
    identity_of,
    is_weights,
    read_claim,
    read_manifest,
    to_bytes,
)  # fmt: skip
from headwise.runs.read import find_runs, read_plan
from headwise.runs.remote import BATCH_BYTES, BATCH_FILES, CHUNK, Store, open_store
from headwise.runs.transfer import SILENT, Copy, Progress, copy_of, digest_of, is_there


def push(
    folder: str | Path, target: str | Path, *, snapshot: bool = False, progress: Progress = SILENT
) -> Copy:
    """Copy a run, or a folder of runs, to a store, and verify the copy.

    The URL of the copy is recorded in `copies.json` of the run's folder.

    Args:
        target: a path or a URL, as for `open_store`; the files of the copy lie below it.
        snapshot: copy a run that is still running, in its present state.

    Raises:
        HeadwiseError: the run is running; the target holds something else, or a later state; a written file
            cannot be read back; or the store cannot be reached. Written files stay for the next push.
    """
    path = Path(os.path.realpath(folder))
    if not path.is_dir():
        raise HeadwiseError(
            f"{shortened(folder)} is not a folder; give the folder of a run, or a folder that holds runs"
        )
    store = open_store(target)
    if store.folder is not None:
        there = Path(os.path.realpath(store.folder))
        if there.is_relative_to(path) or path.is_relative_to(there):
            raise HeadwiseError(f"{target} and {folder} lie one inside the other; give another target")
    runs = [run.path for run in find_runs(path)]
    if not runs:
        raise HeadwiseError(f"no runs below {shortened(folder)}: a run is a folder with a status.json")
    if not snapshot:
        for run in runs:
            _refuse_running(RunFolder(run))
    if runs == [path]:
        return _push_run(RunFolder(path), store, progress)
    return _push_folder(path, runs, store, progress)


def _push_folder(path: Path, runs: list[Path], store: Store, progress: Progress) -> Copy:
    """Copy each run separately, then the files beside the runs, and last the manifest that lists the runs."""
    plan = read_plan(path)
    about = f"{plan.get('name')}\0{plan.get('baseline')}\0{plan.get('question')}" if plan else path.name
    identity = hashlib.sha256(b"folder\0" + about.encode()).hexdigest()
    before = _begin(store, identity, path)
    inside = tuple(
        _push_run(RunFolder(run), store.below(run.relative_to(path).as_posix()), progress) for run in runs
    )
    names = {run.relative_to(path).as_posix() for run in runs} | set(before["runs"] if before else ())
    own = files_of(path, tuple(runs))
    with _still(own) as still:
        manifest = _listed(still, "folder", identity, "", 0, progress)
        manifest["runs"] = sorted(names)
        moved = _write(store, manifest, still, before, progress)
    copies.record(path, store, manifest)
    return copy_of(store, manifest, moved, inside)


def _push_run(folder: RunFolder, store: Store, progress: Progress) -> Copy:
    identity = identity_of(folder)
    before = _begin(store, identity, folder.path)
    status = folder.read_status()
    with _still(files_of(folder.path)) as files:
        manifest = _listed(files, "run", identity, state_of(status), int(status.get("step") or 0), progress)
        if before is not None:
            _refuse_to_lose(before, manifest, store)
        moved = _write(store, manifest, files, before, progress)
    copies.record(folder.path, store, manifest)
    return copy_of(store, manifest, moved)


def _begin(store: Store, identity: str, folder: Path) -> Manifest | None:
    """The manifest of an earlier copy of the same run; refuses a target that holds anything else."""
    before, claim = read_manifest(store), read_claim(store)
    for found in (before, claim):
        if found is not None and found["identity"] != identity:
            raise HeadwiseError(
                f"{store.url} holds a copy of another run or folder than {folder}; give another target"
            )
    others = set() if before or claim else {name for name in store.files() if not _is_beside(name)}
    if others:
        raise HeadwiseError(
            f"{store.url} holds other files, such as {min(others)[:80]}; give an empty target"
        )
    return before


def _is_beside(name: str) -> bool:
    """Whether a file is hidden, or the README of a new repository; no copy contains such a file."""
    return name == "README.md" or name.startswith(".")


def _refuse_to_lose(before: Manifest, now: Manifest, store: Store) -> None:
    """Refuse to replace a copy by an earlier state, or to replace or delete weights in it."""
    ours = {file["name"]: file["sha256"] for file in now["files"]}
    if before["step"] > now["step"]:
        raise HeadwiseError(
            f"{store.url} holds a later state of this run (step {before['step']:,}, here step "
            f"{now['step']:,}); give another target"
        )
    newest = max(map(checkpoint_step, ours), default=-1)
    for file in filter(lambda file: is_weights(file["name"]), before["files"]):
        name = file["name"]
        if ours.get(name) == file["sha256"]:
            continue
        outlived = before["state"] not in RESULTS and -1 < checkpoint_step(name) < newest
        if name in ours or not outlived:
            what = "other weights" if name in ours else "weights that this folder does not hold"
            raise HeadwiseError(f"{store.url} holds {what} ({name}); give another target")


def _listed(
    files: list[LocalFile], kind: str, identity: str, state: str, step: int, progress: Progress
) -> Manifest:
    progress.begin("reading", sum(file.size for file in files))
    listed: list[FileOfCopy] = []
    for file in files:
        size, digest = digest_of(file.path, progress.count)
        listed.append({"name": file.name, "size": size, "sha256": digest})
    return {
        "format": FORMAT, "kind": "run" if kind == "run" else "folder", "identity": identity, "state": state,
        "step": step, "files": listed, "runs": [],
    }  # fmt: skip


def _write(
    store: Store, manifest: Manifest, files: list[LocalFile], before: Manifest | None, progress: Progress
) -> int:
    """Write the missing files, verify all files, then write the manifest; returns the bytes written."""
    there = store.files()
    progress.begin(f"comparing with {store.url}", sum(file["size"] for file in manifest["files"]))
    paths = {file.name: file.path for file in files}
    absent = [f for f in manifest["files"] if not is_there(store, there, f, progress.count)]
    if not absent and before == manifest and CLAIM not in there:
        return 0
    claim = to_bytes({"format": FORMAT, "identity": manifest["identity"]})
    moved = sum(file["size"] for file in absent)
    progress.begin(f"writing to {store.url}", moved)
    store.put([(CLAIM, claim)])
    for batch in _batches(absent):
        store.put([(file["name"], paths[file["name"]]) for file in batch], progress.count)
    there = store.files() if absent else there
    progress.begin(f"reading back from {store.url}", moved)
    for file in absent:
        if not is_there(store, there, file, progress.count):
            raise HeadwiseError(
                f"{file['name']} did not arrive complete at {store.url}, or it changed meanwhile; push again"
            )
    if store.read(CLAIM, limit=len(claim)) != claim:
        raise HeadwiseError(f"another push is writing to {store.url}; wait for it, then push again")
    content = to_bytes(manifest)
    store.put([(MANIFEST, content)])
    if store.read(MANIFEST, limit=len(content)) != content:
        raise HeadwiseError(f"the manifest at {store.url} differs from the one that was written; push again")
    kept = {file["name"] for file in manifest["files"]}
    stale = [file["name"] for file in (before or manifest)["files"] if file["name"] not in kept]
    store.delete([CLAIM, *(name for name in stale if name in there)])
    return moved


def _batches(files: list[FileOfCopy]) -> Iterator[list[FileOfCopy]]:
    batch: list[FileOfCopy] = []
    for file in files:
        if batch and (
            len(batch) >= BATCH_FILES or sum(f["size"] for f in batch) + file["size"] > BATCH_BYTES
        ):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _refuse_running(folder: RunFolder) -> None:
    status = folder.read_status()
    if state_of(status) == "running":
        raise HeadwiseError(
            f"{folder.path} is running (process {status.get('pid')} on {status.get('host')}); wait until it "
            "ends, or push its present state with --snapshot"
        )


@contextmanager
def _still(files: list[LocalFile]) -> Iterator[list[LocalFile]]:
    """The files in their present state: files that a run appends to are copied first, others never change."""
    with ExitStack() as stack:
        still = []
        aside: Path | None = None
        for number, file in enumerate(files):
            if file.path.suffix not in (".csv", ".txt", ".json", ".jsonl", ".log"):
                still.append(file)
                continue
            if aside is None:
                aside = Path(stack.enter_context(tempfile.TemporaryDirectory(suffix=DRAFT)))
            place = aside / str(number)
            with reading.opened(file.path) as source, place.open("wb") as out:
                shutil.copyfileobj(source, out, CHUNK)
            still.append(LocalFile(file.name, place, place.stat().st_size))
        yield still
