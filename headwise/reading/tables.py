"""What a Parquet file holds, read from its footer before any row is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headwise.reading.opening import Unreadable, must_be_regular
from headwise.reading.panics import first_line, is_panic

ROWS = 20_000_000
ROWS_A_BYTE = 64
"""Rows for each byte of a larger file: what packs best, a column of one value, takes a byte for 64 rows."""


def parquet_columns(
    path: str | Path,
    required: Mapping[str, str] | None = None,
    *,
    accept: Callable[[Mapping[str, str]], None] | None = None,
) -> dict[str, str]:
    """The columns of a Parquet file, each with its kind: integer, float, text or other.

    Args:
        required: columns that must be there, with the kind that they must be of.
        accept: gets the file's metadata before any column is looked at, and raises where it refuses the file.

    Raises:
        Missing: there is no such file.
        Unreadable: the footer is damaged, claims more rows than such a file holds, or lacks a column.
    """
    import pyarrow.parquet as pq

    size = must_be_regular(path)
    with (
        library_problems(path),
        open(path, "rb") as raw,
        pq.ParquetFile(raw) as file,
    ):  # a path may look like a URI
        rows, schema, pairs = file.metadata.num_rows, file.schema_arrow, file.metadata.metadata or {}
    if accept is not None:
        accept({key.decode(errors="replace"): value.decode(errors="replace") for key, value in pairs.items()})
    with library_problems(path):
        found = {field.name: _kind(field.type) for field in schema}
        if len(found) < len(schema):
            raise Unreadable(path, "two of its columns have the same name")
    if not 0 <= rows <= max(ROWS, ROWS_A_BYTE * size):
        raise Unreadable(path, f"it claims {rows:,} rows in {size:,} bytes")
    for name, kind in (required or {}).items():
        if name not in found:
            raise Unreadable(path, f"it has no column {name!r}")
        if found[name] != kind:
            raise Unreadable(path, f"its column {name!r} is {found[name]}, not {kind}")
    return found


@contextmanager
def library_problems(path: str | Path) -> Iterator[None]:
    """Turn whatever polars and pyarrow raise for a damaged file into an `Unreadable`, panics included."""
    import polars
    import pyarrow as pa

    known = (pa.ArrowException, polars.exceptions.PolarsError, OSError, ValueError, TypeError, LookupError)
    try:
        yield
    except Unreadable:
        raise
    except BaseException as error:
        if isinstance(error, (*known, MemoryError, OverflowError)) or is_panic(error):
            raise Unreadable(path, f"it is damaged ({first_line(error)})") from error
        raise


def _kind(of: Any) -> str:
    import pyarrow.types as types

    tests: dict[str, Callable[[Any], bool]] = {
        "integer": types.is_integer, "float": types.is_floating,
        "text": lambda t: types.is_string(t) or types.is_large_string(t) or types.is_string_view(t),
    }  # fmt: skip
    return next((name for name, test in tests.items() if test(of)), "other")
