"""Token shards (query-scaling study): `.npz` files with an int32 array `(N, S)` of token ids.

The array is the one named input_ids, tokens, ids or arr_0, or the only 2-D integer array of the
file. Shards are read one at a time, checked, and written once into the cache as one int32 file
`(rows, S)` that is mapped into memory. Nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta

from headwise import reading
from headwise.data.folders import files_of
from headwise.data.progress import progress
from headwise.data.text import files_checksum, is_sealed, only_one, seal
from headwise.errors import HeadwiseError
from headwise.files import local, replacing, write_json

KEYS = ("input_ids", "tokens", "ids", "arr_0")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shards:
    """Every sequence of the shards, int32 `(rows, S)`, and what they are."""

    sequences: np.ndarray
    checksum: str
    files: int
    vocab_size: int


def shard_files(path: str | Path) -> list[Path]:
    """The `.npz` files of a folder, sorted by name, or the one file.

    Raises:
        HeadwiseError: there is none.
    """
    path = local(path)
    if not path.exists():
        raise HeadwiseError(f"shards {str(path)!r} do not exist; give an .npz file or a folder of them")
    files = files_of(path, path.glob("*.npz")) if path.is_dir() else [path]
    files = [file for file in files if not (path.is_dir() and file.name.startswith("."))]
    if not files:
        raise HeadwiseError(
            f"the folder {str(path)!r} has no .npz shards; `headwise data prepare` makes them"
        )
    return files


def open_shards(path: str | Path, cache: Path, vocab_size: int | None = None) -> Shards:
    """The shards of a folder or file, mapped from the cache.

    Args:
        path: a folder of `.npz` files or one of them.
        cache: the folder in which the mapped file is kept.
        vocab_size: ids must be below it; by default what the manifest beside the shards says,
            else the largest id + 1.

    Raises:
        HeadwiseError: a shard is damaged, or its ids or widths do not fit.
    """
    files = shard_files(path)
    checksum = files_checksum(files)
    target = cache / "shards" / checksum[:32]
    with only_one(target):
        if not is_sealed(target):
            with replacing(target) as draft:
                draft.mkdir()
                _convert(files, draft)
                seal(draft)
    facts = _facts_of(target)
    limit = vocab_size or manifest_vocab_size(files[0].parent) or facts["max"] + 1
    if facts["max"] >= limit:
        raise HeadwiseError(
            f"shards {str(path)!r} have the id {facts['max']}, outside a vocabulary of {limit}; "
            "use the tokenizer they were made with"
        )
    shape = (facts["rows"], facts["width"])
    sequences = np.memmap(target / "sequences.bin", dtype=np.int32, mode="r", shape=shape)
    return Shards(sequences, checksum, len(files), limit)


def manifest_vocab_size(folder: Path) -> int | None:
    """The vocabulary size that the manifest of `headwise data prepare` states; None without one."""
    manifest = read_manifest(folder)
    if manifest is not None and "vocab_size" not in manifest:
        raise HeadwiseError(f"{folder / MANIFEST} states no vocab_size; delete or repair it")
    return manifest["vocab_size"] if manifest else None


class ManifestTokenizer(TypedDict, total=False):
    """The tokenizer that shards were made with."""

    name: str
    checksum: str


class ManifestSettings(TypedDict, total=False):
    """The options of a preparation, as far as somebody reads them; others are compared whole."""

    tokenizer: ManifestTokenizer


class ManifestShard(TypedDict):
    """One shard of a manifest."""

    file: str
    sha256: str


class Manifest(TypedDict, total=False):
    """`manifest.json`, which `headwise data prepare` writes last."""

    vocab_size: Annotated[int, Meta(ge=1, le=2**31)]
    sequences: int
    tokens: int
    sources: dict[str, dict[str, int | bool]]
    shards: list[ManifestShard]
    settings: ManifestSettings


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest beside shards; None where there is none.

    Raises:
        HeadwiseError: it is damaged.
    """
    try:
        return reading.read_json(folder / MANIFEST, Manifest)
    except reading.Missing:
        return None
    except reading.Unreadable as error:
        raise error.so("delete or repair it") from error


class _Shape(TypedDict):
    rows: Annotated[int, Meta(ge=1, le=2**40)]
    width: Annotated[int, Meta(ge=1, le=2**40)]
    max: Annotated[int, Meta(ge=0, lt=2**31)]


def _facts_of(target: Path) -> dict[str, int]:
    """Rows, width and largest id of a converted folder in the cache, which its file must have room for.

    Raises:
        HeadwiseError: it is damaged.
    """
    try:
        facts = reading.read_json(target / "shape.json", _Shape)
        held = reading.must_be_regular(target / "sequences.bin")
    except reading.Unreadable as error:
        raise error.so(f"delete {target} and run again") from error
    if held != 4 * facts["rows"] * facts["width"]:
        raise HeadwiseError(f"{target / 'sequences.bin'} is damaged; delete {target} and run again")
    return facts


def _convert(files: list[Path], folder: Path) -> None:
    rows, width, largest = 0, None, 0
    with (
        (folder / "sequences.bin").open("wb") as out,
        progress("reading shards", len(files), "shards") as advance,
    ):
        for file in files:
            ids = read_shard(file)
            if width is not None and ids.shape[1] != width:
                raise HeadwiseError(
                    f"{file} has sequences of {ids.shape[1]} tokens, {files[0].name} of {width}; "
                    "put them in separate folders"
                )
            width = ids.shape[1]
            rows += len(ids)
            largest = max(largest, int(ids.max()))
            out.write(ids.astype(np.int32, copy=False).tobytes())
            advance(1)
    write_json(folder / "shape.json", {"rows": rows, "width": width, "max": largest})


def read_shard(file: Path, vocab_size: int | None = None) -> np.ndarray:
    """One shard's token ids `(N, S)`, in the file's integer type.

    Raises:
        HeadwiseError: the file is damaged, has no such array, or has ids below 0 or not below
            `vocab_size` (or that int32 cannot hold).
    """
    ids = _array(file)
    if ids.size == 0:
        raise HeadwiseError(f"{file} has no sequences: its array has shape {ids.shape}")
    low, high = int(ids.min()), int(ids.max())
    limit = 2**31 if vocab_size is None else vocab_size
    if low < 0 or high >= limit:
        known = "" if vocab_size is None else f", outside a vocabulary of {vocab_size}"
        wrong = low if low < 0 else high
        raise HeadwiseError(f"{file} has the id {wrong}{known}; ids are whole numbers from 0 to {limit - 1}")
    return ids


def _array(file: Path) -> np.ndarray:
    try:
        with reading.Arrays.open(file) as arrays:
            found = [
                name for name, header in arrays.headers.items()
                if len(header.shape) == 2 and header.dtype.kind in "iu"
            ]  # fmt: skip
            named = [name for name in KEYS if name in found]
            if not named and len(found) != 1:
                names = ", ".join(sorted(arrays.headers)[:20])
                raise HeadwiseError(
                    f"{file} has no 2-D integer array to read: it holds {names or 'nothing'}; "
                    f"name it one of {', '.join(KEYS)}"
                )
            return arrays.read((named or found)[0])
    except reading.Unreadable as error:
        raise HeadwiseError(f"{file} is damaged or not a shard ({error.reason}); make it again") from error


def split_rows(sequences: np.ndarray) -> dict[str, np.ndarray]:
    """Contiguous train, val and test: 90%, 5% and 5% of the rows, at least one each."""
    rows = len(sequences)
    if rows < 3:
        raise HeadwiseError(f"the shards have {rows} sequences; three splits need at least 3")
    held_out = max(1, rows * 5 // 100)
    first, second = rows - 2 * held_out, rows - held_out
    return {"train": sequences[:first], "val": sequences[first:second], "test": sequences[second:]}
