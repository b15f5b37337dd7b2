"""Documents with their source, one after the other: from local files, or a Hugging Face dataset.

Files: `.jsonl` and `.json` (a record per line), `.parquet`, and any other name as text; `.gz`,
`.bz2`, `.zst` and `.lz4` behind a name are unpacked while reading. A text file is read in pieces
of a megabyte that end at a line's end (or a space), each a document of the source "text".
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from headwise import reading
from headwise.data.folders import files_of
from headwise.data.hub import load_dataset, revision_of
from headwise.data.text import files_checksum
from headwise.errors import HeadwiseError
from headwise.files import local

_TEXT_PIECE = 1 << 20
_LONGEST = 64 << 20
"""Bytes of the longest line."""

_PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}

Position = tuple[int, int]
"""(file, record): the next record to read. A dataset is file 0."""


@dataclass(frozen=True)
class Document:
    """A text, the source it names (None where the kind of file has no fields), and what follows it."""

    text: str
    source: str | None
    next: Position


@dataclass(frozen=True)
class Fields:
    """Where a record keeps its text and its source; a dot goes into a nested record."""

    text: str = "text"
    source: str | None = "meta.redpajama_set_name"

    def hints(self) -> dict[str, str]:
        """The paths that are read, with what to do about one that is not there."""
        hints = {self.text: "name the text's with --text-field"}
        if self.source is not None:
            hints[self.source] = "name the source's with --source-field, or keep every source with --keep all"
        return hints


class Documents(Protocol):
    """Something to read documents from, in an order that does not change."""

    def identity(self) -> dict[str, Any]:
        """What is read; another identity means other documents."""
        ...

    def read(self, start: Position) -> Iterator[Document]:
        """The documents from `start` on."""
        ...


def open_documents(
    source: str,
    fields: Fields,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    cache: Path | None = None,
    pattern: str = "*",
) -> Documents:
    """The documents of a file, of the files of a folder that fit a pattern, or of a Hugging Face dataset.

    Raises:
        HeadwiseError: there is nothing of that name.
    """
    path = local(source)
    if path.is_file():
        return Files([path], path.parent, fields)
    if path.is_dir():
        files = [file for file in files_of(path, _matching(path, pattern)) if not file.name.startswith(".")]
        if not files:
            raise HeadwiseError(
                f"the folder {source!r} has no files that fit {pattern!r}; give jsonl, parquet or text files"
            )
        return Files(files, path, fields)
    if path.exists():
        reading.must_be_regular(path)
    if source.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".json", ".parquet", ".txt"):
        raise HeadwiseError(f"{source!r} does not exist; give a file, a folder or a dataset's name")
    return HubDataset(source, fields, dataset_config, split, streaming, cache)


def _matching(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder and of those in it that fit a pattern."""
    if not pattern or ".." in Path(pattern).parts:
        raise HeadwiseError(f"--pattern {pattern!r} names nothing inside the folder; give one such as *.c")
    try:
        return list(folder.rglob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise HeadwiseError(
            f"--pattern {pattern!r} cannot be used ({error}); give one such as *.c"
        ) from error


def field(record: Any, path: str, place: str, hint: str) -> Any:
    """The value of a record at a dotted path.

    Args:
        place: of the record, for a message.
        hint: what to do where it is not there.

    Raises:
        HeadwiseError: it is not there; the message names the fields that are.
    """
    value = record
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise HeadwiseError(f"{place} has no field {path!r} (it has {known}); {hint}")
        value = value[name]
    return value


def _document(record: Any, fields: Fields, place: str, following: Position) -> Document:
    hints = fields.hints()
    text = field(record, fields.text, place, hints[fields.text])
    if not isinstance(text, str):
        raise HeadwiseError(f"{place} has {type(text).__name__} instead of a text in {fields.text!r}")
    _refuse_surrogate(text, place, fields.text)
    if fields.source is None:
        return Document(text, None, following)
    source = str(field(record, fields.source, place, hints[fields.source]))
    _refuse_surrogate(source, place, fields.source)
    return Document(text, source, following)


def _refuse_surrogate(text: str, place: str, name: str) -> None:
    """Refuse half of a character, which JSON can write (`\\ud83d`) and no UTF-8 can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HeadwiseError(
            f"{place} has half of a character in {name!r} (\\u{ord(text[error.start]):04x}, the character "
            f"{error.start + 1}); repair or remove it"
        ) from error


class Files:
    """Documents of local files in the order of their paths."""

    def __init__(self, files: list[Path], root: Path, fields: Fields) -> None:
        self.files, self.root, self.fields = files, root, fields

    def identity(self) -> dict[str, Any]:
        """The checksum of every file's content."""
        contents = {file.relative_to(self.root).as_posix(): files_checksum([file]) for file in self.files}
        return {"files": contents}

    def read(self, start: Position) -> Iterator[Document]:
        for index in range(start[0], len(self.files)):
            skip = start[1] if index == start[0] else 0
            yield from self._read_file(index, skip)

    def _read_file(self, index: int, skip: int) -> Iterator[Document]:
        import pyarrow as pa

        file = self.files[index]
        suffixes = [suffix for suffix in file.suffixes if suffix not in _PACKED]
        kind = suffixes[-1] if suffixes else ""
        try:
            if kind == ".parquet":
                records = self._parquet(file, skip)
            elif kind in (".jsonl", ".json", ".ndjson"):
                records = self._json_lines(file, skip)
            else:
                yield from self._text(index, skip)
                return
            for number, record in enumerate(records, start=skip):
                place = f"record {number + 1} of {file}"
                yield _document(record, self.fields, place, (index, number + 1))
        except (pa.ArrowException, OSError, EOFError, ValueError, MemoryError, OverflowError) as error:
            raise HeadwiseError(
                f"{file} cannot be read ({reading.first_line(error)}); is it damaged?"
            ) from error

    def _parquet(self, file: Path, skip: int) -> Iterator[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.ParquetFile(pa.OSFile(os.fsencode(file)))
        names = table.schema_arrow.names
        columns = {path.split(".")[0]: hint for path, hint in self.fields.hints().items()}
        for column, hint in columns.items():
            field(dict.fromkeys(names), column, str(file), hint)
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if skip >= rows:
                skip -= rows
                continue
            for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=list(columns)):
                # Sliced before it becomes Python objects; a whole batch may be behind us.
                kept = batch.slice(min(skip, batch.num_rows))
                skip -= min(skip, batch.num_rows)
                yield from kept.to_pylist()

    def _json_lines(self, file: Path, skip: int) -> Iterator[Any]:
        stream, number = self._open(file), 0
        while line := stream.readline(_LONGEST + 1):
            number += 1
            if len(line) > _LONGEST:
                raise HeadwiseError(
                    f"line {number} of {file} is longer than the {_LONGEST >> 20} MB that a record may have"
                )
            if number <= skip:
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise HeadwiseError(
                    f"line {number} of {file} is not a JSON record ({error}); repair or remove it"
                ) from error

    def _text(self, index: int, skip: int) -> Iterator[Document]:
        stream, number, rest = self._open(self.files[index]), 0, b""
        while block := stream.read(_TEXT_PIECE):
            rest += block
            end = rest.rfind(b"\n") + 1 or rest.rfind(b" ") + 1
            if end and number >= skip:
                yield self._piece(index, number, rest[:end])
            number += bool(end)
            rest = rest[end:]
            if len(rest) > _LONGEST:
                raise HeadwiseError(
                    f"{self.files[index]} has {_LONGEST >> 20} MB without the end of a line or a space; "
                    "break its lines"
                )
        if rest and number >= skip:
            yield self._piece(index, number, rest)

    def _piece(self, index: int, number: int, piece: bytes) -> Document:
        try:
            return Document(piece.decode(), None, (index, number + 1))
        except UnicodeDecodeError as error:
            raise HeadwiseError(f"{self.files[index]} is not UTF-8 text ({error}); convert it") from error

    @staticmethod
    def _open(file: Path) -> io.BufferedReader:
        import pyarrow as pa

        raw = pa.OSFile(os.fsencode(file))  # as bytes: a name need not be UTF-8
        return io.BufferedReader(pa.input_stream(raw, compression=_PACKED.get(file.suffix)), 1 << 20)


class HubDataset:
    """Documents of a Hugging Face dataset: from a download kept in the cache, or streamed."""

    def __init__(
        self,
        name: str,
        fields: Fields,
        dataset_config: str | None,
        split: str,
        streaming: bool,
        cache: Path | None,
    ) -> None:
        self.fields, self.name = fields, name
        self.options = {"name": dataset_config, "split": split, "streaming": streaming}
        self._dataset = load_dataset(
            name, "give a file or a folder", cache_dir=str(cache) if cache else None, **self.options
        )

    def identity(self) -> dict[str, Any]:
        """The download's rows and the checksum of its files; a stream's revision on the hub."""
        facts: dict[str, Any] = {"dataset": self.name, **self.options}
        if self.options["streaming"]:
            return facts | {"rows": None, "revision": revision_of(self.name)}
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        return facts | {"rows": len(self._dataset), "checksum": files_checksum(files)}

    def read(self, start: Position) -> Iterator[Document]:
        rows = self._dataset.skip(start[1])
        for number, record in enumerate(rows, start=start[1]):
            place = f"record {number + 1} of {self.name}"
            yield _document(record, self.fields, place, (0, number + 1))
