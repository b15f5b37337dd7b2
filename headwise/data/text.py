"""Text as bytes in three splits, mapped into memory where it is a file.

The splits are contiguous: the first 90% of the bytes train, then 5% validate, 5% test. A border
moves on to the next start of a UTF-8 character, so that bytes and every tokenizer are judged on
the same validation text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import alone, write_json

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
    return {"files": len(names), "files_checksum": hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()}


def map_bytes(path: Path) -> np.ndarray:
    """A file's bytes, uint8 `(n,)`, mapped into memory."""
    with reading.opened(path) as file:
        if file.seek(0, 2) == 0:
            raise HeadwiseError(f"{path} is empty; give a file with text")
        return np.memmap(file, dtype=np.uint8, mode="r")


def is_binary(path: Path) -> bool:
    """Whether the first megabyte has a NUL byte, which no text has."""
    with reading.opened(path) as file:
        return b"\0" in file.read(_BLOCK)


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
        with reading.opened(path) as file:
            while block := file.read(_BLOCK):
                yield block


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
        stated = reading.read_json(folder / SEAL, dict[str, str])
    except reading.Missing:
        return False
    except reading.Unreadable as error:
        raise error.so(f"delete {folder} and run again") from error
    for name, checksum in stated.items():
        if not (folder / name).is_file() or files_checksum([folder / name]) != checksum:
            raise HeadwiseError(f"{folder / name} is damaged; delete {folder} and run again")
    return bool(stated)


@contextmanager
def only_one(target: Path) -> Iterator[None]:
    """Hold a lock beside `target`: of several processes that want it in the cache, one makes it.

    Raises:
        HeadwiseError: the cache cannot be written.
    """
    with ExitStack() as held:
        try:
            held.enter_context(alone(target.with_name(f".{target.name}.lock"), "fills the cache", wait=True))
        except (HeadwiseError, OSError) as error:
            raise HeadwiseError(
                f"the cache {target.parent} cannot be written ({getattr(error, 'strerror', None) or error}); "
                "set data.cache or HEADWISE_CACHE to a folder that can"
            ) from error
        yield
