"""Entropies in a report: spreads, what goes with what, and the log, of runs with and without entanglement."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from headwise import report
from headwise.measures import table as head_table
from headwise.questions.sections import sections

STEPS = range(10, 61, 10)


def add_windows(folder: Path, seed: int) -> None:
    """Entanglement that falls with training, and sparsity that falls where it rises."""
    layer, head = (a.ravel() for a in np.indices((2, 2)))
    for step in STEPS:
        entanglement = 3 - step / 60 + 0.3 * layer + 0.1 * head * (1 + seed)
        values = {
            "entanglement": entanglement,
            "regional_entanglement": entanglement / 2,
            "sparsity": 4 - entanglement,
        }
        columns = {"run": "x", "step": step, "layer": layer, "head": head} | values
        head_table.write_part(folder / "entanglement", f"step_{step:08d}", columns)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, make) -> dict[str, Path]:
    cost = {
        "window": 64,
        "n_windows": 8,
        "n_regions": 4,
        "every": 1,
        "evaluations": 6,
        "seconds": 3.0,
        "share": 0.02,
    }
    variants = {"flash": make.Variant("flash", summary={"entanglement": cost}), "mha": make.Variant("mha")}
    folder = make.study(tmp_path_factory.mktemp("s"), variants, seeds=(0, 1), shape=make.SMALL)
    for seed in (0, 1):
        add_windows(folder / "flash" / f"seed_{seed}", seed)
    return report.build(folder, sections=sections())


def test_correlations_run_by_run_and_over_seeds(paths: dict[str, Path]) -> None:
    flash, mha = json.loads(paths["json"].read_text())["entropies"]
    assert (flash["variant"], list(flash["measures"])) == (
        "flash", ["entropy", "entanglement", "regional_entanglement"],
    )  # fmt: skip
    assert list(mha["measures"]) == ["entropy"]
    pairs = {pair["pair"]: pair for pair in flash["pairs"]}
    heads = pairs["Entanglement entropy and sparsity"]
    assert [run["r"] for run in heads["runs"]] == pytest.approx([-1, -1])
    assert [run["n"] for run in heads["runs"]] == [4, 4]
    over = pairs["Entanglement entropy and validation loss"]
    for run in over["runs"]:
        assert run["n"] == len(STEPS)
        half = 1.959964 / math.sqrt(run["n"] - 3)
        assert math.atanh(run["high"]) - math.atanh(run["r"]) == pytest.approx(half, rel=1e-5)
        assert run["r"] > 0.8  # the loss falls too
    assert over["seeds"]["seeds"] == 2
    assert over["seeds"]["low"] < over["seeds"]["r"] < over["seeds"]["high"]
    assert [pair["pair"] for pair in mha["pairs"]] == ["Entropy and validation loss"]


def test_series_boxes_and_cost(paths: dict[str, Path]) -> None:
    flash = json.loads(paths["json"].read_text())["entropies"][0]
    shown = flash["measures"]["entanglement"]
    assert [line["seed"] for line in shown["lines"]] == [0, 1]
    assert shown["lines"][0]["by_layer"][-1] == pytest.approx([2.05, 2.35])
    assert sorted(shown["last"][0]) == pytest.approx([2.0, 2.0, 2.1, 2.2])
    text = paths["markdown"].read_text()
    assert "| flash | 64 | 8 | 4 | 1 | 6 | 0.500 | 2.0% |" in text
    assert (
        "| flash | Entanglement entropy (nats) | 0 | 4 | 2.0000 | 2.0000 | 2.0500 | 2.1250 | 2.2000 |" in text
    )
    for name in ("spread_entropy", "spread_entanglement", "spread_regional_entanglement", "entanglement"):
        assert (paths["figures"] / f"{name}.png").is_file()
    assert 'id="entropies-plots"' in paths["html"].read_text()


def test_the_log_has_a_row_for_each_head_and_evaluation(paths: dict[str, Path]) -> None:
    rows = list(csv.DictReader(paths["entropy_log.csv"].open()))
    assert list(rows[0])[3:] == [
        "step", "layer", "head", "entropy", "entanglement", "regional_entanglement", "sparsity",
    ]  # fmt: skip
    assert len(rows) == 2 * 2 * len(STEPS) * 4
    first = next(row for row in rows if (row["variant"], row["seed"]) == ("flash", "1"))
    assert (first["step"], first["layer"], first["head"]) == ("10", "0", "0")
    assert float(first["entanglement"]) == pytest.approx(3 - 1 / 6, rel=1e-5)
    assert {row["entanglement"] for row in rows if row["variant"] == "mha"} == {""}
    assert all(float(row["entropy"]) > 0 for row in rows)


def test_damaged_windows_are_left_out(tmp_path: Path, make) -> None:
    run = make.run(tmp_path / "run", make.Variant("mha"), 0, make.SMALL)
    (run / "entanglement").mkdir()
    (run / "entanglement" / "step_00000010.parquet").write_bytes(b"no")
    built = report.build(run, sections=sections())
    (entry,) = json.loads(built["json"].read_text())["entropies"]
    assert list(entry["measures"]) == ["entropy"]
    assert "entropy_log.csv" in built
