"""Heads of several softmaxes in reports: each part by itself, and none in a mean with another."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from headwise.errors import HeadwiseError
from headwise.measures import table as head_table
from headwise.report import atlas, figures, tables
from headwise.report.conclusions import head_signals
from headwise.runs.read import Run

STEPS, LAYERS, HEADS = (0, 10), 2, 3
PARTS = (None, "1", "2")


def columns(step: int) -> dict[str, Any]:
    """Entropy of both parts, `100 layer + 10 head + part + step`, and λ of the whole head, likewise."""
    layer, part, head = np.meshgrid(np.arange(LAYERS), np.arange(3), np.arange(HEADS), indexing="ij")
    layer, part, head = layer.ravel(), part.ravel(), head.ravel()
    value = 100.0 * layer + 10 * head + part + step
    return {
        "run": "a", "step": step, "layer": layer, "head": head, "part": np.array(PARTS, object)[part],
        "entropy": np.where(part > 0, value, np.nan), "lambda": np.where(part == 0, value, np.nan),
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    for step in STEPS:
        head_table.write_part(tmp_path / "heads", f"step_{step:08d}", columns(step))
    return Run(tmp_path)


def test_parts_are_read_as_they_were_written(run: Run) -> None:
    table = head_table.read(run.path / "heads")
    assert table.columns[: len(head_table.KEYS)] == list(head_table.KEYS)
    assert table["part"].to_list() == [part for part in PARTS for _ in range(HEADS)] * LAYERS * len(STEPS)


def test_a_file_without_parts_has_no_such_column_and_the_number_it_had(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    whole = {name: value for name, value in columns(0).items() if name != "part"}
    path = head_table.write_part(tmp_path, "a", whole)
    found = pq.read_schema(path)
    assert "part" not in found.names
    assert found.metadata[head_table.FORMAT_KEY.encode()] == b"1"
    assert head_table.read(tmp_path)["part"].null_count() == len(whole["head"])
    head_table.write_part(tmp_path, "b", columns(0))
    assert pq.read_schema(tmp_path / "b.parquet").metadata[head_table.FORMAT_KEY.encode()] == b"2"
    both = head_table.read(tmp_path)  # a table of both kinds of files is one table
    assert both["part"].null_count() == len(whole["head"]) + LAYERS * HEADS


@pytest.mark.parametrize("name", ["", "a b", "<b>", "A", "x" * 17])
def test_a_name_that_no_part_has_is_damage(tmp_path: Path, name: str) -> None:
    head_table.write_part(tmp_path, "a", columns(0) | {"part": name})
    with pytest.raises(HeadwiseError, match=r"a\.parquet is damaged .*its column 'part' has names"):
        head_table.read(tmp_path)


def test_a_part_that_is_no_text_is_damage(tmp_path: Path) -> None:
    path = head_table.write_part(tmp_path, "a", columns(0))
    frame = pl.read_parquet(path).with_columns(pl.lit(1).alias("part"))
    frame.write_parquet(path)
    with pytest.raises(HeadwiseError, match="its column 'part' is integer, not text"):
        head_table.read(tmp_path)


def test_a_grid_has_a_column_for_each_part(run: Run) -> None:
    found = atlas.grid(run)
    assert found is not None
    assert found["columns"]["entropy"] == [(head, part) for head in range(HEADS) for part in ("1", "2")]
    assert found["columns"]["lambda"] == [(head, "") for head in range(HEADS)]
    assert found["measures"]["entropy"].shape == (len(STEPS), LAYERS, 2 * HEADS)
    assert found["measures"]["lambda"].shape == (len(STEPS), LAYERS, HEADS)
    for column, (head, part) in enumerate(found["columns"]["entropy"]):
        assert found["measures"]["entropy"][1, 1, column] == 100 + 10 * head + int(part) + 10


def test_the_atlas_and_the_tables_name_the_parts(run: Run) -> None:
    found = atlas.grid(run)
    assert found is not None
    shown = atlas.atlas({"a": [(run, True, found)]})["variants"]["a"][0]
    assert shown["columns"]["entropy"][:3] == ["0 part 1", "0 part 2", "1 part 1"]
    assert shown["columns"]["lambda"] == ["0", "1", "2"]
    json.dumps(shown)
    variant = {"per_head": atlas.per_head([found]), "per_layer_head": atlas.per_layer_head([found])}
    first = variant["per_head"]["entropy"][0]
    assert (first["head"], first["part"], first["mean"]) == (0, "1", 61.0)  # of layers 0 and 1, one part
    assert [row[0] for row in tables.per_head(variant, "entropy").rows][:3] == [
        "0 part 1",
        "0 part 2",
        "1 part 1",
    ]
    by_place = {(row[0], row[1]): row[2:] for row in tables.per_layer_head(variant).rows}
    assert by_place["1", "2 part 2"] == ["132.0000", ""]
    assert by_place["1", "2"] == ["", "130.0000"]
    figure = figures.head_atlas(
        {"atlas": {"variants": {"a": [shown]}}}, {"name": "entropy", "label": "Entropy", "unit": ""}
    )
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "head (0 part 1, 0 part 2, …)"


def test_heads_without_parts_are_shown_as_before(tmp_path: Path) -> None:
    whole = {name: value for name, value in columns(0).items() if name != "part"}
    some = np.arange(len(whole["head"])) % 9 < HEADS
    whole = {n: v[some] if isinstance(v, np.ndarray) else v for n, v in whole.items()}
    head_table.write_part(tmp_path / "heads", "step_00000000", whole)
    found = atlas.grid(Run(tmp_path))
    assert found is not None
    assert "columns" not in found
    assert "columns" not in atlas.atlas({"a": [(Run(tmp_path), True, found)]})["variants"]["a"][0]
    assert all("part" not in row for row in atlas.per_layer_head([found])["lambda"])


def test_entropies_of_parts_are_not_held_against_the_importance_of_heads(run: Run) -> None:
    found = atlas.grid(run)
    assert found is not None
    known = {"importance": {"delta_loss": [[0.1, 0.2, 0.4]] * LAYERS}}
    measured, material = SimpleNamespace(get=known.get, seed=0), SimpleNamespace(variants=["a"])
    assert head_signals(material, {"a": [(measured, True, found)]}) == {}  # type: ignore[arg-type,list-item]
    whole = {"measures": {"entropy": found["measures"]["lambda"]}}
    assert "a" in head_signals(material, {"a": [(measured, True, whole)]})  # type: ignore[arg-type,list-item]
