"""WikiText-103 (Merity et al. 2016), raw: from Hugging Face, or from a file or folder.

It comes with splits of its own, and they are used: a file belongs to the split its name speaks of
(`wiki.train.raw`, `validation-00000-of-00001.parquet`). Files that name no split are joined and
cut 90/5/5. `data.fraction` takes the first part of the training text alone, so that runs on
different fractions are judged on the same validation text.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from headwise import reading
from headwise.data.config import DataConfig
from headwise.data.folders import files_of
from headwise.data.hub import load_dataset
from headwise.data.text import (
    Text,
    blocks,
    character_start,
    file_facts,
    files_checksum,
    map_bytes,
    only_one,
    split_90_5_5,
)
from headwise.errors import HeadwiseError
from headwise.files import local, replacing

HUB_NAME, HUB_CONFIG = "Salesforce/wikitext", "wikitext-103-raw-v1"
_SPLIT_NAMES = {"train": "train", "valid": "val", "validation": "val", "val": "val", "test": "test"}


def open_wikitext(config: DataConfig) -> Text:
    """The text that `data.path` holds, or the hub's.

    Raises:
        HeadwiseError: it is missing or damaged, or `datasets` is not installed.
    """
    if config.path is None:
        splits = _from_hub(config.cache_folder)
        facts: dict[str, object] = {"hub": f"{HUB_NAME}/{HUB_CONFIG}"}
    else:
        files = _files(local(config.path), config.cache_folder)
        facts = file_facts([file.name for file in files])
        splits = _from_files(files, config.cache_folder)
    keep = character_start(splits["train"], int(len(splits["train"]) * config.fraction))
    splits["train"] = splits["train"][:keep]
    return Text(splits, {**facts, "fraction": config.fraction})


def _files(path: Path, cache: Path) -> list[Path]:
    files = files_of(path, path.rglob("*"), cache) if path.is_dir() else [path]
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    files = [file for file in files if file.suffix == ".parquet"] or files
    if not files or not path.exists():
        raise HeadwiseError(f"data.path={str(path)!r} has no files; give a parquet or text file or a folder")
    return files


def _from_files(files: list[Path], cache: Path) -> dict[str, np.ndarray]:
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.name.lower())
        split = next((_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES), None)
        by_split.setdefault(split, []).append(file)
    if {"train", "val", "test"} <= by_split.keys():
        return {split: _in_cache(by_split[split], cache, split) for split in ("train", "val", "test")}
    return split_90_5_5(_in_cache(files, cache, "all"))


def _in_cache(files: list[Path], cache: Path, split: str) -> np.ndarray:
    """The text of `files` as one mapped file; a lone text file is mapped where it is."""
    if len(files) == 1 and files[0].suffix != ".parquet":
        return map_bytes(files[0])
    contents = [(file.suffix, files_checksum([file])) for file in files]
    key = hashlib.sha256(repr(contents).encode()).hexdigest()[:32]
    return _written(cache / "wikitext103" / f"{key}.{split}.txt", lambda: _pieces(files))


def _pieces(files: list[Path]) -> Iterator[bytes]:
    for file in files:
        if file.suffix == ".parquet":
            yield from (text.encode() for text in parquet_column(file, "text"))
        else:
            yield from blocks([file])


def parquet_column(file: Path, column: str) -> Iterator[str]:
    """The strings of a parquet file's column, a batch of rows in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        reading.must_be_regular(file)
        table = pq.ParquetFile(pa.OSFile(os.fsencode(file)))
        if column not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise HeadwiseError(f"{file} has no column {column!r}; it has {names}")
        for rows in table.iter_batches(batch_size=1024, columns=[column]):
            texts = rows.column(0).to_pylist()
            if wrong := next((text for text in texts if not isinstance(text, str | None)), None):
                raise HeadwiseError(f"{file} has a {type(wrong).__name__} in column {column!r}, not a text")
            yield from (text or "" for text in texts)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise HeadwiseError(
            f"{file} cannot be read as parquet ({reading.first_line(error)}); is it damaged?"
        ) from error


def _from_hub(cache: Path) -> dict[str, np.ndarray]:
    def rows(name: str) -> Callable[[], Iterable[bytes]]:
        return lambda: (
            row["text"].encode()
            for row in load_dataset(
                HUB_NAME,
                "pass --data.path=FILE_OR_FOLDER",
                name=HUB_CONFIG,
                split=name,
                cache_dir=str(cache / "huggingface"),
            )
        )

    names = {"train": "train", "val": "validation", "test": "test"}
    return {
        split: _written(cache / "wikitext103" / f"hub.{split}.txt", rows(name))
        for split, name in names.items()
    }


def _written(target: Path, pieces: Callable[[], Iterable[bytes]]) -> np.ndarray:
    with only_one(target):
        if not target.exists():
            with replacing(target) as draft, draft.open("wb") as file:
                file.writelines(pieces())
    return map_bytes(target)
