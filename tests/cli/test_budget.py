"""`headwise budget` from a run folder to its report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from headwise.cli.main import main
from headwise.config.run import from_dict
from headwise.questions.budget.page import markdown, statements, write
from headwise.training.run import train

TINY = {
    "model.d_model": 16, "model.n_layers": 2, "model.n_heads": 2, "model.attention.kind": "selective",
    "data.name": "ngram", "data.vocab_size": 16, "data.seq_len": 16, "data.batch_size": 4,
    "data.eval_sequences": 8, "training.max_steps": 2, "measure.heads": False, "measure.maps": 0,
    "device": "cpu", "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "Z"
    train(from_dict(TINY | {"out": str(out)}))
    return out


def test_the_report_of_one_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", str(run), "--budgets", "1.0", "0.5", "0.25", "0.125", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "No baseline was named" in said
    folder = run / "budget"
    assert {path.name for path in folder.iterdir()} == {
        f"budget.{k}" for k in ("md", "html", "json", "csv", "png")
    }
    data = json.loads((folder / "budget.json").read_text())
    losses = [point["mean"] for point in data["series"][0]["points"]]
    with (folder / "budget.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == losses
    assert [row["keys"] for row in rows] == ["16", "8", "4", "2"]
    for loss in losses:
        assert f"{loss:.4f}" in said
        assert f"{loss:.4f}" in (folder / "budget.md").read_text()
    page = (folder / "budget.html").read_text()
    assert 'http-equiv="Content-Security-Policy"' in page
    assert "Plotly" in page


def test_a_file_is_no_folder_to_write_to(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/inside"):
        assert main(["budget", str(run), "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr()
        assert said.out == ""  # nothing was measured
        assert said.err.count("\n") == 1
        assert f"--out {tmp_path / out} cannot be a folder: {tmp_path / 'file'} is a file" in said.err


@pytest.mark.parametrize("budget", ["1.5", "0", "-0.25"])
def test_a_budget_outside_of_0_to_1_is_one_line_and_exit_code_2(
    run: Path, budget: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["budget", str(run), "--budgets", budget]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"a budget of {float(budget):g} is no share" in said[0]


def test_the_point_of_parity_is_named_with_its_interval(tmp_path: Path) -> None:
    point = {"budget": 1.0, "keys": 8, "losses": {"1": 2.0}, "n": 1, "mean": 2.0, "std": None, "ci95": None}
    parity = {"share": 0.2, "low": 0.1, "high": 0.4, "text": "s: parity with flash at 0.2"}
    series = {"name": "s", "variant": "s", "kind": "selective", "method": "kept", "seeds": [1]}
    series |= {"points": [point | {"difference": {"mean": None, "ci95": None}}], "parity": parity}
    base = {"name": "flash", "losses": {"1": 2.0}, "n": 1, "mean": 2.0, "std": None, "ci95": None}
    data = {
        "title": "t", "written": "now", "budgets": [1.0], "data": "d", "checksum": "c", "seq_len": 8,
        "sequences": 1, "calibration": None, "baseline": base, "series": [series], "notes": ["left out: x"],
    }  # fmt: skip
    assert statements(data) == ["s: parity with flash at 0.2."]
    assert "Left out: x." in markdown(data)
    assert all(path.stat().st_size > 200 for path in write(data, tmp_path).values() if path.suffix != ".csv")
