"""Text as bytes in three splits, mapped into memory where it is a file.

The splits are contiguous: the first 90% of the bytes train, then 5% validate, 5% test. A border
moves on to the next start of a UTF-8 character, so that bytes and every tokenizer are judged on
the same validation text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from headwise.errors import HeadwiseError
from headwise.files import write_json

SEAL = "checksums.json"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Text:
    """The splits of a text, each uint8 `(n,)`, and what is known of where they are from."""

    splits: Mapping[str, np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def checksum(self) -> str:
        """sha256 of the splits one after the other: of the whole text."""
        digest = hashlib.sha256()
        for part in self.splits.values():
            digest.update(part.data)
        return digest.hexdigest()


def file_facts(names: list[str]) -> dict[str, Any]:
    """The number of files and a checksum of their list."""
    return {"files": len(names), "files_checksum": hashlib.sha256("\n".join(names).encode()).hexdigest()}


def map_bytes(path: Path) -> np.ndarray:
    """A file's bytes, uint8 `(n,)`, mapped into memory."""
    try:
        if path.stat().st_size == 0:
            raise HeadwiseError(f"{path} is empty; give a file with text")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> HeadwiseError:
    """The error to raise for a file that the system refuses."""
    return HeadwiseError(f"{path} cannot be read ({error.strerror or error}); check it and its permissions")


def is_binary(path: Path) -> bool:
    """Whether the first megabyte has a NUL byte, which no text has."""
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(_BLOCK)
    except OSError as error:
        raise unreadable(path, error) from error


def split_90_5_5(whole: np.ndarray) -> dict[str, np.ndarray]:
    """Cut bytes into contiguous train, val and test, each border at the start of a character."""
    first = character_start(whole, len(whole) * 90 // 100)
    second = character_start(whole, max(first, len(whole) * 95 // 100))
    return {"train": whole[:first], "val": whole[first:second], "test": whole[second:]}


def character_start(text: np.ndarray, place: int) -> int:
    """The first place from `place` on where a UTF-8 character starts, or the end."""
    while place < len(text) and text[place] & 0xC0 == 0x80:
        place += 1
    return place


def files_checksum(files: Iterable[Path]) -> str:
    """sha256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for block in blocks(files):
        digest.update(block)
    return digest.hexdigest()


def blocks(files: Iterable[Path]) -> Iterator[bytes]:
    """The bytes of `files`, one after the other, a megabyte at a time."""
    for path in files:
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block
        except OSError as error:
            raise unreadable(path, error) from error


def seal(folder: Path) -> None:
    """Write down the checksum of every file in a folder of the cache, for `is_sealed`."""
    write_json(folder / SEAL, {file.name: files_checksum([file]) for file in sorted(folder.iterdir())})


def is_sealed(folder: Path) -> bool:
    """Whether a folder of the cache was sealed, and holds what it held then, byte by byte.

    False where there is none, or one of an older version without a seal: it is made again.

    Raises:
        HeadwiseError: a file in it has changed.
    """
    try:
        stated = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise HeadwiseError(f"{folder / SEAL} is damaged; delete {folder} and run again") from error
    for name, checksum in stated.items() if isinstance(stated, dict) else ():
        if not (folder / name).is_file() or files_checksum([folder / name]) != checksum:
            raise HeadwiseError(f"{folder / name} is damaged; delete {folder} and run again")
    return bool(stated)


@contextmanager
def only_one(target: Path) -> Iterator[None]:
    """Hold a lock beside `target`: of several processes that want it in the cache, one makes it.

    Raises:
        HeadwiseError: the cache cannot be written.
    """
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise HeadwiseError(
            f"the cache {target.parent} cannot be written ({error.strerror or error}); "
            "set data.cache or HEADWISE_CACHE to a folder that can"
        ) from error
    try:
        yield
    finally:
        lock.release()
