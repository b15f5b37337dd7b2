"""The head table: one tidy Parquet table of per-head measures, a folder of whole parts.

The same columns serve training, profiling and intervention. A level that a table does not
resolve (a table averaged over tokens, say) is null in its key column; a measure that a kind
of attention cannot offer is absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import replacing
from headwise.measures.spec import FORMER_NAMES, KEYS, MEASURES, PART, WINDOW_MEASURES, measures

__all__ = ["KEYS", "MEASURES", "read", "read_columns", "unmeasured", "unmeasured_lines", "write_part"]

if TYPE_CHECKING:
    import polars
    import pyarrow


FORMAT = 2
"""Of a file with a column `part`; 1 has none, and 0 had no number."""
WITHOUT_PARTS = 1
FORMAT_KEY = "headwise_format"
UNMEASURED_KEY = "headwise_unmeasured"
"""Of what has no rows here, in a part's metadata: a JSON object of layers to reasons."""

_KINDS = {"string": "text", "int64": "integer", "int32": "integer"}
SHOWN = 3
"""Layers that a line of reasons names."""
MOST = 1 << 16
"""Layers, and heads of a layer."""


def write_part(
    folder: str | Path,
    name: str,
    columns: dict[str, np.ndarray | str | int],
    *,
    unmeasured: Mapping[int | str, str] | None = None,
) -> Path:
    """Write one part `folder/name.parquet`, whole or not at all, and return its path.

    Args:
        columns: key columns and measures; arrays of one length, or a scalar for a whole column.
            Keys that are left out become null; a `part` that is left out is no column.
        unmeasured: attention layers that have no rows, by number or name, and why; kept as metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = measures() | WINDOW_MEASURES
    unknown = set(columns) - set(KEYS) - set(known)
    if unknown:
        raise ValueError(f"head table has no column {sorted(unknown)[0]!r}")
    length = max(len(c) for c in columns.values() if isinstance(c, np.ndarray))
    fields, arrays = [], []
    for key, type_name in KEYS.items():
        kind = pa.type_for_alias(type_name)
        value = columns.get(key)
        if key == "part" and value is None:
            continue
        if value is None:
            arrays.append(pa.nulls(length, kind))
        elif isinstance(value, np.ndarray):
            arrays.append(pa.array(value, kind))
        else:
            arrays.append(pa.repeat(pa.scalar(value, kind), length))
        fields.append(pa.field(key, kind, nullable=value is None or key == "part"))
    for measure in known:
        value = columns.get(measure)
        if value is not None:
            values = np.asarray(value)
            dtype = np.float16 if values.dtype == np.float16 else np.float32
            arrays.append(pa.array(values.astype(dtype, copy=False)))
            fields.append(pa.field(measure, arrays[-1].type, nullable=False))
    path = Path(folder) / f"{name}.parquet"
    number = WITHOUT_PARTS if columns.get("part") is None else FORMAT
    metadata = {FORMAT_KEY: str(number)}
    if unmeasured:
        reasons = {str(layer): why for layer, why in unmeasured.items()}
        metadata[UNMEASURED_KEY] = json.dumps(reasons, sort_keys=True)
    schema = pa.schema(fields, metadata=metadata)
    with replacing(path) as draft, draft.open("wb") as file:  # a path may look like a URI to a library
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), file, **_encoding(fields))
    return path


def _encoding(fields: list[pyarrow.Field]) -> dict[str, Any]:
    """How a part is encoded, so that it takes little time first and little room second.

    Numbers are split by the place of their bytes, for the bytes of one place resemble each other. Not
    a dictionary, which looks up every value; nor statistics, which no reader of a whole table uses;
    and no nulls but where a column is nothing else, for they are counted value by value.
    """
    import pyarrow.types as kinds

    numbers = [
        field.name for field in fields if kinds.is_integer(field.type) or kinds.is_floating(field.type)
    ]
    # A float's exponent is alone in its byte, where runs of it are found soon. A half's shares its byte
    # with the fraction, which only zstd's entropy coding makes smaller.
    halves = {field.name for field in fields if kinds.is_float16(field.type)}
    return {
        "use_dictionary": False,
        "column_encoding": dict.fromkeys(numbers, "BYTE_STREAM_SPLIT"),
        "compression": {field.name: "zstd" if field.name in halves else "lz4" for field in fields},
        "write_statistics": False,
        "write_batch_size": 1 << 14,
    }


def refuse_newer(part: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a part that a newer headwise wrote.

    Raises:
        HeadwiseError: the format in its metadata is newer than this headwise knows.
    """
    number = metadata.get(FORMAT_KEY, "0")
    if number not in [str(known) for known in range(FORMAT + 1)]:
        raise HeadwiseError(
            f"head table part {part} has format {number} and this headwise reads up to {FORMAT}; "
            "upgrade headwise to use it"
        )


def unmeasured(folder: str | Path) -> dict[str, str]:
    """The attention layers that have no rows in a table, by number or name, and why.

    Raises:
        HeadwiseError: a part is damaged or of a newer headwise.
    """
    found: dict[str, str] = {}

    def note(metadata: Mapping[str, str]) -> None:
        refuse_newer(part, metadata)
        text = metadata.get(UNMEASURED_KEY, "{}")
        try:
            found.update(reading.check(reading.parse_json(text), dict[str, str]))
        except reading.Unreadable as error:
            raise reading.Unreadable(
                part, f"its {UNMEASURED_KEY} holds no reasons: {error.reason}"
            ) from error

    for part in sorted(Path(folder).glob("*.parquet")):
        try:
            reading.parquet_columns(part, accept=note)
        except reading.Unreadable as error:
            raise error.so("delete it and run again") from error
    return found


def unmeasured_lines(reasons: Mapping[int | str, str]) -> list[str]:
    """What has no rows, a line for each reason: `self_attn, 3 are not measured: why`."""
    by_reason: dict[str, list[str]] = {}
    for layer, why in reasons.items():
        name = f"layer {layer}" if str(layer).isdigit() else str(layer)
        by_reason.setdefault(why, []).append(name)
    lines = []
    for why, names in by_reason.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        verb = "is" if len(names) == 1 else "are"
        lines.append(f"{', '.join(names[:SHOWN])}{more} {verb} not measured: {why}")
    return lines


def read(folder: str | Path) -> polars.DataFrame:
    """All parts of a head table as one polars frame, measures as float32, in the order of their names.

    Columns of older tables have today's names; a column that no measure here has is kept. `part` is null
    where a file has none.

    Raises:
        HeadwiseError: the folder holds no part, or a part is damaged or of a newer headwise.
    """
    import polars

    parts = sorted(Path(folder).glob("*.parquet"))
    if not parts:
        raise HeadwiseError(f"no head table in {folder}: it holds no .parquet part")
    frames = []
    for part in parts:
        try:
            check_part(part)
            with reading.library_problems(part), part.open("rb") as file:  # a path may look like a pattern
                frame = polars.read_parquet(file).rename(FORMER_NAMES, strict=False)
            frames.append(frame.cast({polars.Float16: polars.Float32}))
            _refuse_places(part, frame)
        except reading.Unreadable as error:
            raise HeadwiseError(
                f"head table part {part} is damaged ({error.reason}); delete it and run again"
            ) from error
    table = polars.concat(frames, how="diagonal")
    if "part" not in table.columns:
        table = table.with_columns(polars.lit(None, polars.String).alias("part"))
    return table.select(*KEYS, polars.exclude(*KEYS))


def read_columns(part: str | Path, columns: Sequence[str]) -> pyarrow.Table:
    """Some columns of one part under their names of today.

    Raises:
        HeadwiseError: the part is damaged, lacks one of them, or is of a newer headwise.
    """
    import pyarrow.parquet as pq

    part = Path(part)
    try:
        today = {FORMER_NAMES.get(name, name): name for name in check_part(part)}
        if missing := next((name for name in columns if name not in today), None):
            raise reading.Unreadable(part, f"it has no column {missing!r}")
        with reading.library_problems(part), part.open("rb") as raw, pq.ParquetFile(raw) as file:
            return file.read(columns=[today[name] for name in columns]).rename_columns(list(columns))
    except reading.Unreadable as error:
        raise error.so("delete it and run again") from error


def check_part(path: Path) -> dict[str, str]:
    """The columns of one part with their kinds, from its footer. Every reader of parts begins here.

    Raises:
        HeadwiseError: a newer headwise wrote it, whatever its columns are.
        reading.Unreadable: it is not a part of a head table.
    """
    keys = {key: _KINDS[name] for key, name in KEYS.items() if key != "part"}
    columns = reading.parquet_columns(path, keys, accept=partial(refuse_newer, path))
    if columns.get("part", "text") != "text":
        raise reading.Unreadable(path, f"its column 'part' is {columns['part']}, not text")
    for name in (*measures(), *WINDOW_MEASURES, *FORMER_NAMES):
        if columns.get(name, "float") != "float":
            raise reading.Unreadable(path, f"its column {name!r} is {columns[name]}, not float")
    return columns


def _refuse_places(path: Path, frame: polars.DataFrame) -> None:
    """Refuse layers and heads that no model has: arrays are made of their size."""
    for key in ("layer", "head"):
        low, high = frame[key].min(), frame[key].max()
        if frame[key].null_count() or (low is not None and not 0 <= int(low) <= int(high) < MOST):  # type: ignore[arg-type]
            raise reading.Unreadable(path, f"its column {key!r} has a place below 0, above {MOST} or empty")
    parts = frame["part"].drop_nulls().unique().to_list() if "part" in frame.columns else []
    if not all(PART.fullmatch(part) for part in parts):
        raise reading.Unreadable(path, "its column 'part' has names that no part of a head has")
