"""`headwise sweep` from its file to its table: what does not fit is a result, and nothing runs twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from headwise.cli.main import main

FILE = {
    "base": {
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
        "data": {"name": "copy", "batch_size": 4, "eval_sequences": 4},
        "training": {"eval_every": 0, "checkpoint_every": 0, "warmup_steps": 0},
        "measure": {"heads": False, "maps": 0},
    },
    "axes": {"data.seq_len": [16, 256, 1024]},
    "seeds": [0],
    "budget": {"kind": "steps", "value": 2},
    "memory_limit": "1.5MB",
    "max_length_until": 256,
}


def table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_a_sweep_has_a_row_for_what_fits_what_shrinks_and_what_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(FILE))
    out = ["--out", str(tmp_path / "runs")]
    command = ["sweep", str(tmp_path / "tiny.yaml"), "--device", "cpu", "--max-length-at", "1.5MB", *out]
    assert main(command) == 0
    folder = tmp_path / "runs" / "tiny"
    rows = table(folder / "sweep_results.csv")
    short, middle, long = (rows[f"run@seq_len={length}"] for length in (16, 256, 1024))
    assert (short["status"], short["batch_size"], short["wanted_batch_size"]) == ("finished", "4", "")
    assert (middle["status"], middle["wanted_batch_size"]) == ("finished", "4")
    assert int(middle["batch_size"]) < 4
    assert int(middle["batch_size"]) * int(middle["passes_per_step"]) == 4
    assert long["status"] == "out_of_memory"
    assert float(long["peak_mb_tried"]) > 1.5
    assert long["val_loss"] == ""
    [found] = json.loads((folder / "max_lengths.json").read_text())["rows"]
    assert 0 < found["max_seq_len"] <= 256
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/seed_0/status.json")}
    before[folder / "max_lengths.json"] = (folder / "max_lengths.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert table(folder / "sweep_results.csv") == rows
