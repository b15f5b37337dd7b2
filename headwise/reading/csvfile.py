"""Rows of a CSV file that has the columns it must have."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from pathlib import Path

from headwise.reading.opening import MEGABYTE, Unreadable, read_text

LIMIT = 512 * MEGABYTE


def read_csv(path: str | Path, columns: Collection[str] = (), *, limit: int = LIMIT) -> list[dict[str, str]]:
    """The rows of a CSV file, each with a text for every column of the first line.

    Args:
        columns: those that must be there.
        limit: bytes that the file may have.

    Raises:
        Missing: there is no such file.
        Unreadable: a column is missing or there twice, or a row has not one cell for each.
    """
    text = read_text(path, limit=limit)
    try:
        return parse_csv(text, columns)
    except Unreadable as error:
        raise Unreadable(path, error.reason) from None


def parse_csv(text: str, columns: Collection[str] = ()) -> list[dict[str, str]]:
    """As `read_csv`, of a text."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        header = next(reader, [])
        again = next((name for name in header if header.count(name) > 1), None) if len(header) < 1000 else ""
        if again is not None:
            raise Unreadable(None, f"its first line names the column {again[:80]!r} twice, or far too many")
        if missing := [name for name in columns if name not in header]:
            raise Unreadable(None, f"it has no column {missing[0]!r}")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise Unreadable(
                    None, f"line {reader.line_num} has {len(cells)} cells, and the first line {len(header)}"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise Unreadable(None, f"it is no CSV: {error} in line {reader.line_num}") from None
    return rows
