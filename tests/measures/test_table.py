"""The head table: typed parts that appear whole, read together; what is not offered is absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from headwise.errors import HeadwiseError
from headwise.measures import table as head_table


def part(folder: Path, step: int, **measures: np.ndarray) -> Path:
    keys = {"run": "a", "step": step, "layer": np.array([0, 0], np.int32), "head": np.array([0, 1], np.int32)}
    return head_table.write_part(folder, f"step_{step:08d}", keys | measures)


def test_parts_are_read_together(tmp_path: Path) -> None:
    part(tmp_path, 10, entropy=np.array([1.0, np.nan]))
    part(tmp_path, 2, entropy=np.array([0.5, 0.25]), margin=np.array([1, 2]))
    table = head_table.read(tmp_path)
    assert table.columns == [*head_table.KEYS, "entropy", "margin"]
    assert table["step"].to_list() == [2, 2, 10, 10]
    assert table["token"].null_count() == 4  # the level that is not resolved
    assert table["margin"].to_list() == [1.0, 2.0, None, None]  # the measure that is not offered
    assert table.schema["entropy"] == pl.Float32
    assert table.schema["layer"] == pl.Int32


def test_a_measure_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="entropie"):
        part(tmp_path, 1, entropie=np.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match="no head table"):
        head_table.read(tmp_path)
    path = part(tmp_path, 1, entropy=np.zeros(2))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(HeadwiseError, match=r"step_00000001\.parquet is damaged"):
        head_table.read(tmp_path)


def test_what_has_no_rows_is_kept_with_its_reason(tmp_path):
    columns = {"layer": np.zeros(2, np.int32), "head": np.arange(2, dtype=np.int32), "entropy": np.ones(2)}
    reasons = {1: "it has no weights", 2: "it has no weights", "head.attention": "it bypasses the interface"}
    head_table.write_part(tmp_path, "a", columns, unmeasured=reasons)
    head_table.write_part(tmp_path, "b", columns)
    kept = head_table.unmeasured(tmp_path)
    assert kept == {str(layer): why for layer, why in reasons.items()}
    assert head_table.unmeasured_lines(kept) == [
        "layer 1, layer 2 are not measured: it has no weights",
        "head.attention is not measured: it bypasses the interface",
    ]
    damaged = pq.read_table(tmp_path / "a.parquet")
    for text in (b"[1]", b"{", b'{"a": 1}'):
        pq.write_table(
            damaged.replace_schema_metadata({b"headwise_format": b"1", b"headwise_unmeasured": text}),
            tmp_path / "a.parquet",
        )
        with pytest.raises(HeadwiseError, match="holds no reasons"):
            head_table.unmeasured(tmp_path)
