"""Margins in the report: mean and smallest of each head over seeds, only where a run has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from headwise import report
from headwise.attention.tropical.section import MARGINS, collect
from headwise.questions.sections import sections
from headwise.report.section import Found
from headwise.runs.read import Run


def grid(margin: list[float], least: list[float]) -> dict[str, object]:
    """Two evaluations of one layer with two heads."""
    arrays = {"margin": margin, "margin_min": least}
    measures = {name: np.array([[[9.0, 9.0]], [values]]) for name, values in arrays.items()}
    return {"steps": np.array([5, 10]), "measures": measures}


def test_mean_deviation_and_interval_over_seeds_and_the_smallest_of_all(tmp_path: Path) -> None:
    runs = [
        (Run(tmp_path), True, grid([1.0, np.nan], [0.25, np.nan])),
        (Run(tmp_path), True, grid([3.0, 2.0], [0.5, 0.125])),
        (Run(tmp_path), False, grid([100.0, 100.0], [0.0, 0.0])),  # may not be averaged
    ]
    other = {"steps": np.array([5]), "measures": {"entropy": np.ones((1, 1, 2))}}
    (entry,) = collect(Found([], {"softmax": [(Run(tmp_path), True, other)], "max": runs}, {}))
    first, second = entry["heads"]
    assert (first["layer"], first["head"], first["n"], first["mean"], first["least"]) == (0, 0, 2, 2.0, 0.25)
    assert first["std"] == pytest.approx(2**0.5)
    assert (second["n"], second["mean"], second["ci95"], second["least"]) == (1, 2.0, None, 0.125)
    assert [line["margin"] for line in entry["lines"]] == [[9.0, 1.0], [9.0, 2.5]]
    (titled,) = MARGINS.tables([entry])
    assert titled.table.rows[1] == ["max", "0", "1", "1", "2.000000", "n/a", "n/a", "0.125000"]


def test_a_study_with_margins_has_the_section(built: dict[str, Path]) -> None:
    data = json.loads(built["json"].read_text())["margins"]
    assert [entry["variant"] for entry in data] == ["tropical"]
    assert "## Tropical margins" in built["markdown"].read_text()
    assert (built["figures"] / "margins.png").is_file()


def test_a_study_without_margins_has_none(tmp_path: Path, make) -> None:
    study = make.study(tmp_path / "s", {"flash": make.Variant("flash")}, seeds=(0,), shape=make.SMALL)
    paths = report.build(study, sections=sections())
    assert json.loads(paths["json"].read_text())["margins"] == []
    assert "Tropical margins" not in paths["markdown"].read_text()
