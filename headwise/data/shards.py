"""Token shards (document 004): `.npz` files with an int32 array `(N, S)` of token ids.

The array is the one named input_ids, tokens, ids or arr_0, or the only 2-D integer array of the
file. Shards are read one at a time, checked, and written once into the cache as one int32 file
`(rows, S)` that is mapped into memory. Nothing is unpickled.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headwise.data.progress import progress
from headwise.data.text import files_checksum, is_sealed, only_one, seal
from headwise.errors import HeadwiseError
from headwise.files import replacing, write_json

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
    path = Path(path).expanduser()
    if not path.exists():
        raise HeadwiseError(f"shards {str(path)!r} do not exist; give an .npz file or a folder of them")
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
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
    facts = json.loads((target / "shape.json").read_text())
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
    try:
        return int(json.loads((folder / MANIFEST).read_text())["vocab_size"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadwiseError(f"{folder / MANIFEST} cannot be read ({error}); delete or repair it") from error


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
    found = []
    try:
        with zipfile.ZipFile(file) as archive:
            for name, header in _headers(archive):
                shape, _, dtype = header
                if len(shape) == 2 and dtype.kind in "iu":
                    found.append(name)
            named = [name for name in KEYS if name in found]
            if not named and len(found) != 1:
                names = ", ".join(sorted(Path(entry).stem for entry in archive.namelist()))
                raise HeadwiseError(
                    f"{file} has no 2-D integer array to read: it holds {names or 'nothing'}; "
                    f"name it one of {', '.join(KEYS)}"
                )
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[(named or found)[0]]
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise HeadwiseError(f"{file} is damaged or not a shard ({error}); make it again") from error


def _headers(archive: zipfile.ZipFile) -> Iterator[tuple[str, tuple]]:
    """Name and (shape, fortran_order, dtype) of each array, without reading its values."""
    for entry in archive.namelist():
        with archive.open(entry) as member:
            version = np.lib.format.read_magic(member)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            yield entry.removesuffix(".npy"), read(member)


def split_rows(sequences: np.ndarray) -> dict[str, np.ndarray]:
    """Contiguous train, val and test: 90%, 5% and 5% of the rows, at least one each."""
    rows = len(sequences)
    if rows < 3:
        raise HeadwiseError(f"the shards have {rows} sequences; three splits need at least 3")
    held_out = max(1, rows * 5 // 100)
    first, second = rows - 2 * held_out, rows - held_out
    return {"train": sequences[:first], "val": sequences[first:second], "test": sequences[second:]}
