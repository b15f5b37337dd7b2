"""The head table: one tidy Parquet table of per-head measures, a folder of whole parts.

The same columns serve training, profiling and intervention. A level that a table does not
resolve (a table averaged over tokens, say) is null in its key column; a measure that a kind
of attention cannot offer is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from headwise.errors import HeadwiseError
from headwise.files import replacing

if TYPE_CHECKING:
    import polars
    import pyarrow


FORMAT = 1
"""Of a part; 0 had no number."""
FORMAT_KEY = "headwise_format"


class Measure(NamedTuple):
    """What one column holds, for tables, plots and documentation."""

    definition: str
    unit: str


KEYS = {
    "run": "string", "step": "int64", "sample": "int64",
    "layer": "int32", "head": "int32", "token": "int32",
}  # fmt: skip

MEASURES = {
    "entropy": Measure("-Σ p ln p", "nats"),
    "max_weight": Measure("max_j p_j", ""),
    "k_eff": Measure("fewest keys whose weights sum to at least 0.9", "keys"),
    "query_norm": Measure("‖q_i‖₂ before RoPE", ""),
    "logit_mean": Measure("mean of s[i,j] over visible keys", ""),
    "logit_std": Measure("standard deviation of s[i,j] over visible keys", ""),
    "sink_weight": Measure("weight on key 0", ""),
    "self_weight": Measure("weight on key i", ""),
    "previous_weight": Measure("weight on key i-1", ""),
    "mean_distance": Measure("Σ p_j |i-j|", "tokens"),
    "margin": Measure("tropical margin γ_i", ""),
    "memory": Measure("Σ_j (1 - min(F[i,j], 1)), what selection leaves of the keys", "keys"),
}


def write_part(folder: str | Path, name: str, columns: dict[str, np.ndarray | str | int]) -> Path:
    """Write one part `folder/name.parquet`, whole or not at all, and return its path.

    Args:
        columns: key columns and measures; arrays of one length, or a scalar for a whole column.
            Keys that are left out become null.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    unknown = set(columns) - set(KEYS) - set(MEASURES)
    if unknown:
        raise ValueError(f"head table has no column {sorted(unknown)[0]!r}")
    length = max(len(c) for c in columns.values() if isinstance(c, np.ndarray))
    fields, arrays = [], []
    for key, type_name in KEYS.items():
        kind = pa.type_for_alias(type_name)
        value = columns.get(key)
        if value is None:
            arrays.append(pa.nulls(length, kind))
        elif isinstance(value, np.ndarray):
            arrays.append(pa.array(value, kind))
        else:
            arrays.append(pa.repeat(pa.scalar(value, kind), length))
        fields.append(pa.field(key, kind, nullable=value is None))
    for measure in MEASURES:
        value = columns.get(measure)
        if value is not None:
            values = np.asarray(value)
            dtype = np.float16 if values.dtype == np.float16 else np.float32
            arrays.append(pa.array(values.astype(dtype, copy=False)))
            fields.append(pa.field(measure, arrays[-1].type, nullable=False))
    path = Path(folder) / f"{name}.parquet"
    schema = pa.schema(fields, metadata={FORMAT_KEY: str(FORMAT)})
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


def read(folder: str | Path) -> polars.DataFrame:
    """All parts of a head table as one polars frame, measures as float32, in the order of their names.

    Raises:
        HeadwiseError: the folder holds no part, or a part is damaged.
    """
    import polars

    parts = sorted(Path(folder).glob("*.parquet"))
    if not parts:
        raise HeadwiseError(f"no head table in {folder}: it holds no .parquet part")
    frames = []
    for part in parts:
        try:
            with part.open("rb") as file:  # a path may look like a pattern to polars
                refuse_newer(part, polars.read_parquet_metadata(file))
                file.seek(0)
                frames.append(polars.read_parquet(file).cast({polars.Float16: polars.Float32}))
        except (polars.exceptions.PolarsError, OSError) as error:
            raise HeadwiseError(
                f"head table part {part} is damaged ({str(error).splitlines()[0]}); delete it and run again"
            ) from error
    return polars.concat(frames, how="diagonal")
