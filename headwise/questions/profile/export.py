"""The query-scaling study's CSV from a finished profile."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.files import replacing
from headwise.measures.spec import exported
from headwise.measures.table import check_part, read_columns

if TYPE_CHECKING:
    import pyarrow

KEYS = {"sample": "sample_id", "layer": "layer", "head": "head", "token": "token_pos"}
NEEDED = ("query_norm", "entropy", "max_weight", "k_eff")
"""The query-scaling study's measures, in its order."""
COLUMNS = KEYS | exported(NEEDED)
"""Columns of the head table, and what the query-scaling study calls them."""


def export_csv(out: Path) -> Path:
    """Write `out/attention_metrics_{timestamp}.csv`, a row per token; an absent entropy is empty.

    Where heads have several softmaxes there is a row for each, and a last column `part` names it.

    Raises:
        HeadwiseError: a part is damaged, or the disk full.
    """
    import pyarrow.csv as csv

    path = out / f"attention_metrics_{datetime.now():%Y%m%d_%H%M%S}.csv"
    with replacing(path) as draft, draft.open("wb") as file:
        tables = sorted((out / "heads").glob("*.parquet"))
        in_parts = bool(tables) and "part" in check_part(tables[0])
        names = COLUMNS | ({"part": "part"} if in_parts else {})
        file.write((",".join(names.values()) + "\n").encode())
        for part in tables:
            table = read_columns(part, list(names))
            if in_parts:
                table = _measured(table)
            csv.write_csv(_plain(table), file, csv.WriteOptions(include_header=False))
    return path


def _measured(table: pyarrow.Table) -> pyarrow.Table:
    """The table without rows of whole heads whose parts are measured: they have none of these numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    nothing = pc.is_nan(table["query_norm"].cast(pa.float32()))
    return table.filter(pc.invert(pc.and_(pc.is_null(table["part"]), nothing)))


def _plain(table: pyarrow.Table) -> pyarrow.Table:
    """The table with NaN as null, which CSV shows as nothing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in NEEDED:
        values = table[name].cast(pa.float32())
        nothing = pa.scalar(None, values.type)
        table = table.set_column(
            table.schema.get_field_index(name), name, pc.if_else(pc.is_nan(values), nothing, values)
        )
    return table
