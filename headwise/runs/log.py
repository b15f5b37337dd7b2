"""`metrics.csv` as a table, and whether it can be one."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.reading.csvfile import LIMIT as CSV_LIMIT
from headwise.runs.folder import METRICS

if TYPE_CHECKING:
    import polars

PLAIN_LOG = 1 << 20
"""Bytes of a metrics.csv that is judged without polars."""

_NUMBER = r"-?[0-9]{1,18}(?:\.[0-9]{1,40})?(?:e[+-]?[0-9]{1,2})?"
_PLAIN_LOG = re.compile(
    rf"{','.join(METRICS)}(\r?\n)(?:[0-9]{{1,18}},[a-z]+(?:,(?:{_NUMBER})?){{{len(METRICS) - 2}}}\1)*"
)
"""A log with `METRICS` as its columns and numbers in its cells."""


class Unreadable(HeadwiseError):
    """A file of a run folder exists and cannot be read."""


def is_plain_log(path: Path) -> bool:
    """Whether metrics.csv has today's columns and plain numbers in its cells: then it is not damaged.

    It is judged without polars, which takes a hundred times as long for a short file. A last line without its
    newline does not count.
    """
    with suppress(reading.Unreadable):
        text = reading.read_text(path, limit=PLAIN_LOG)
        return _PLAIN_LOG.fullmatch(text, 0, text.rfind("\n") + 1) is not None
    return False


def read_log(path: Path) -> polars.DataFrame:
    """The rows of metrics.csv; see `Run.metrics`. Raises `Unreadable`."""
    import polars as pl

    text = ""
    with unreadable():
        text = reading.read_text(path, limit=CSV_LIMIT)
    if not text:
        return pl.DataFrame(schema={"step": pl.Int64, "split": pl.String})
    whole = text[: text.rfind("\n") + 1]
    _must_be_even(whole, path)
    with unreadable(), reading.library_problems(path):
        frame = pl.read_csv(whole.encode(), infer_schema=False, truncate_ragged_lines=True)
    if not {"step", "split"} <= set(frame.columns):
        raise Unreadable(f"unreadable {path.name}: no columns step and split in its first line")
    numbers = [pl.col(c).cast(pl.Float64, strict=False) for c in frame.columns if c not in ("step", "split")]
    empty = frame.null_count()
    frame = frame.with_columns(pl.col("step").cast(pl.Int64, strict=False), *numbers)
    for name in frame.columns:
        if frame[name].null_count() > (0 if name == "step" else empty[name].item()):
            raise Unreadable(f"unreadable {path.name}: a value of column {name} is not a number")
    return frame.unique(["step", "split"], keep="last", maintain_order=True).sort("step", maintain_order=True)


def _must_be_even(text: str, path: Path) -> None:
    """Refuse lines with more or fewer cells than the first, which a reader would cut or fill."""
    width = None
    try:
        for number, line in enumerate(csv.reader(io.StringIO(text, newline="")), 1):
            width = width or len(line)
            if len(line) != width:
                raise Unreadable(
                    f"unreadable {path.name}: line {number} has {len(line)} cells for {width} columns"
                )
    except csv.Error as error:
        raise Unreadable(f"unreadable {path.name}: {error}") from None


@contextmanager
def unreadable() -> Iterator[None]:
    """Whatever is wrong with a file within, by its name; nothing where there is no file."""
    try:
        yield
    except reading.Missing:
        pass
    except reading.Unreadable as error:
        raise Unreadable(f"unreadable {Path(str(error.path)).name}: {error.reason}") from error
