"""The manifest of a copy of a run: `headwise-copy.json`, which a push writes last.

A copy of one run lists its files. A copy of a folder of runs lists the folder's own files, and the names of
the runs, each of which is a copy inside with a manifest of its own. While a push is under way,
`headwise-push.json` lies there and identifies the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import LONGEST, is_draft
from headwise.names import leads_out
from headwise.runs.folder import RunFolder, known_format
from headwise.runs.remote import Store
from headwise.runs.schemas import Count

FORMAT = 1
MANIFEST = "headwise-copy.json"
CLAIM = "headwise-push.json"
COPIES = "copies.json"
"""In a run's folder: the URLs of its copies. It is not pushed."""

OWN = (MANIFEST, CLAIM, COPIES)
MANY = 100_000
"""The most files of one copy, and runs of a folder."""
LARGEST = 1 << 44
"""The most bytes of one file: 16 TiB."""
LIMIT = 64 << 20
LONGEST_NAME = 1000
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(min_length=1, max_length=LONGEST_NAME)]


class FileOfCopy(TypedDict):
    """One file."""

    name: Name
    size: Annotated[int, Meta(ge=0, le=LARGEST)]
    sha256: Digest


class Manifest(TypedDict):
    """`headwise-copy.json`."""

    format: Count
    kind: Literal["run", "folder"]
    identity: Digest
    state: Annotated[str, Meta(max_length=40)]
    step: Count
    files: Annotated[list[FileOfCopy], Meta(max_length=MANY)]
    runs: Annotated[list[Name], Meta(max_length=MANY)]


class Claim(TypedDict):
    """`headwise-push.json`."""

    format: Count
    identity: Digest


@dataclass(frozen=True)
class LocalFile:
    """A file of a run's folder, to be pushed."""

    name: str
    path: Path
    size: int


def to_bytes(values: Any) -> bytes:
    """A manifest or a claim as it is written."""
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a copy; None if there is none.

    Raises:
        HeadwiseError: it is damaged, of a newer headwise, names a file outside, or cannot be reached.
    """
    values: Manifest | None = _read(store, MANIFEST, Manifest)
    if values is None:
        return None
    place = f"{store.url}/{MANIFEST}"
    _refuse_names([*(file["name"] for file in values["files"]), *values["runs"]], place)
    if values["kind"] == "run" and values["runs"]:
        raise HeadwiseError(f"{place} cannot be used: it belongs to one run, but lists others")
    return values


def read_claim(store: Store) -> Claim | None:
    """The claim of a push that is under way, or None."""
    claim: Claim | None = _read(store, CLAIM, Claim)
    return claim


def is_weights(name: str) -> bool:
    """Whether a file of a run holds weights, or the state that training needs to continue them."""
    return name.startswith("checkpoints/step_") or name.endswith(WEIGHTS)


def checkpoint_step(name: str) -> int:
    """The step of the checkpoint to which a file belongs; -1 for other files."""
    if not name.startswith("checkpoints/step_"):
        return -1
    number = name.split("/")[1].removeprefix("step_")
    return int(number) if number.isascii() and number.isdecimal() and len(number) < 20 else -1


def files_of(folder: Path, runs: Iterator[Path] | tuple[Path, ...] = ()) -> list[LocalFile]:
    """The files of a run's folder that a copy holds, by name; of a folder of runs, those beside the runs.

    Hidden files and folders, drafts among them, are left out, and links to what lies in the folder too.

    Raises:
        HeadwiseError: one is a device or a pipe, a link that leads out or stands for weights, or they are too
            many.
    """
    found: list[LocalFile] = []
    within = {os.path.abspath(run) for run in runs}
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        folders[:] = sorted(
            name
            for name in folders
            if name not in links
            and not name.startswith(".")
            and os.path.abspath(os.path.join(parent, name)) not in within
        )
        for name in sorted([*names, *links]):
            path = Path(parent, name)
            inside = path.relative_to(folder).as_posix()
            if name.startswith(".") or is_draft(name) or inside in OWN:
                continue
            with suppress(FileNotFoundError):  # a run goes on meanwhile
                about = path.lstat()
                if _is_left_out(folder, path, inside, about.st_mode):
                    continue
                found.append(LocalFile(inside, path, about.st_size))
            if len(found) > MANY:
                raise HeadwiseError(f"{folder} holds more than {MANY:,} files; a copy holds no more")
    _refuse_names([file.name for file in found], str(folder))
    return found


def identity_of(folder: RunFolder) -> str:
    """The identity of a run, which does not change while it runs: its configuration and its log's first
    line."""
    digest = hashlib.sha256()
    with suppress(reading.Missing):
        digest.update(reading.read_bytes(folder.config, limit=LIMIT))
    with suppress(reading.Missing), reading.opened(folder.log) as log:
        digest.update(b"\0" + log.readline(1 << 16))
    return digest.hexdigest()


def _read(store: Store, name: str, schema: Any) -> Any:
    content = store.read(name, limit=LIMIT)
    if content is None:
        return None
    place = f"{store.url}/{name}"
    try:
        values = reading.parse_json(content, finite=True)
        known_format(place, known=FORMAT)(values)
        return reading.check(values, schema)
    except reading.Unreadable as error:
        raise HeadwiseError(f"{place} cannot be read: {error.reason}") from None


def _is_left_out(folder: Path, path: Path, inside: str, mode: int) -> bool:
    """Whether a link is left out; refuses a path that is not a file."""
    if stat.S_ISREG(mode):
        return False
    if not stat.S_ISLNK(mode):
        raise HeadwiseError(f"{path} is a pipe, a socket or a device, but a copy holds only files; delete it")
    if leads_out(folder, path) or inside.startswith("checkpoints") or is_weights(inside):
        raise HeadwiseError(
            f"{path} is a link, but a copy holds only files; replace it by the file, or delete it"
        )
    return True


def _refuse_names(names: list[str], place: str) -> None:
    """Refuse names that are no files below one folder.

    Raises:
        HeadwiseError: names the first.
    """
    known = set(names)
    fault = "is there twice" if len(known) < len(names) else ""
    for name in names:
        parts = name.split("/")
        if not fault and not all(map(_is_plain, parts)):
            fault = "is not the name of a file inside"
        if not fault and name in OWN:
            fault = "is reserved"
        if not fault and any("/".join(parts[:n]) in known for n in range(1, len(parts))):
            fault = "lies in another file"
        if not fault and len(name) > LONGEST_NAME:
            fault = "is too long"
        if fault:
            raise HeadwiseError(f"{place} cannot be used: the name {name[:80]!r} {fault}")


def _is_plain(part: str) -> bool:
    return (
        part not in ("", ".", "..")
        and not part.startswith(".")
        and part.isprintable()
        and "\\" not in part
        and len(part.encode("utf-8", "surrogatepass")) <= LONGEST
    )
