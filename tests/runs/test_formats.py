"""Older run folders are read whole and resumed, newer ones are left as they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from headwise.cli.main import main
from headwise.errors import HeadwiseError
from headwise.measures import table as head_table
from headwise.runs import checkpoint
from headwise.runs.folder import FORMAT, METRICS, RunFolder
from headwise.runs.read import Run, Study
from headwise.study.folders import refuse_newer_plan

OLD = """step,split,loss,lr
0,val,5.5,
1,train,5.25,0.001
2,train,5.125,0.002
3,train,5.0,0.003
4,train,4.875,0.004
"""
"""metrics.csv of a time when there were four columns."""


@pytest.fixture
def old(tmp_path: Path) -> RunFolder:
    """A run folder of format 0: without a number, with fewer columns."""
    folder = RunFolder(tmp_path / "run")
    folder.start("seed: 1\n")
    folder.metrics.write_text(OLD)
    status = {"state": "interrupted", "pid": 1, "host": "h", "heartbeat": 1.0, "step": 4}
    (folder.path / "status.json").write_text(json.dumps(status))
    return folder


def test_columns_that_did_not_exist_are_empty(old: RunFolder) -> None:
    rows = old.read_metrics()
    assert [row["loss"] for row in rows] == ["5.5", "5.25", "5.125", "5.0", "4.875"]
    assert {row["penalty"] for row in rows} == {""}
    assert set(rows[0]) == set(METRICS)
    assert Run(old.path).state == "interrupted"
    assert Run(old.path).curve("train", "loss")[1].tolist() == [5.25, 5.125, 5.0, 4.875]
    assert Run(old.path).curve("train", "penalty")[1].size == 0


def test_a_resume_keeps_every_old_row(old: RunFolder) -> None:
    old.drop_after(3)
    old.append_metrics([{"step": 4, "split": "train", "loss": 4.5, "penalty": 0.5}])
    with old.metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"]) for row in rows] == [
        ("0", "5.5"), ("1", "5.25"), ("2", "5.125"), ("3", "5.0"), ("4", "4.5"),
    ]  # fmt: skip
    assert rows[-1]["penalty"] == "0.5"


def test_rows_are_appended_below_an_older_header_under_their_own_columns(old: RunFolder) -> None:
    old.append_metrics([{"step": 5, "split": "train", "loss": 4.5, "penalty": 0.5}])
    rows = old.read_metrics()
    assert len(rows) == 6
    assert (rows[-1]["loss"], rows[-1]["penalty"], rows[1]["lr"]) == ("4.5", "0.5", "0.001")


def test_a_column_that_is_not_known_is_kept(old: RunFolder) -> None:
    old.metrics.write_text("step,split,loss,mood\n1,train,5.0,good\n2,train,4.0,bad\n")
    old.drop_after(1)
    old.append_metrics([{"step": 2, "split": "train", "loss": 4.5}])
    assert [row["mood"] for row in old.read_metrics()] == ["good", ""]


@pytest.mark.parametrize(
    "text",
    ["5.5,train\n", "a,b\n1,2\n", "step,split,loss,loss\n1,train,1,1\n", OLD + "x,train,1,1\n",
     OLD + "5,train,1\n", OLD + "5,train,1,1,1\n", "nothing that a log begins with"],
)  # fmt: skip
def test_no_resume_rewrites_what_it_cannot_read(old: RunFolder, text: str) -> None:
    old.metrics.write_text(text)
    (old.path / "heads").mkdir()
    (old.path / "heads" / "step_00000009.parquet").touch()
    with pytest.raises(HeadwiseError, match=r"metrics\.csv is damaged in line \d+: "):
        old.drop_after(2)
    assert old.metrics.read_text() == text
    assert (old.path / "heads" / "step_00000009.parquet").exists()


@pytest.mark.parametrize("cut", [0, 3, 7, 30])
def test_a_first_line_that_a_kill_cut_short_is_begun_again(old: RunFolder, cut: int) -> None:
    old.metrics.write_text(",".join(METRICS)[:cut])
    old.drop_after(-1)
    old.append_metrics([{"step": 1, "split": "train", "loss": 1.5}])
    assert [row["loss"] for row in old.read_metrics()] == ["1.5"]


@pytest.mark.parametrize("name", ["status.json", "summary.json"])
@pytest.mark.parametrize("number", [FORMAT + 1, "2", None, True, 0.5])
def test_a_newer_run_is_left_alone(
    old: RunFolder, name: str, number: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (old.path / name).write_text(json.dumps({"state": "finished", "format": number}))
    before = {path: path.read_bytes() for path in old.path.iterdir()}
    for call in (old.refuse_newer, lambda: old.drop_after(0)):
        with pytest.raises(HeadwiseError, match=rf"{name} has format .* upgrade headwise"):
            call()
    assert main(["train", "--resume", "--out", str(old.path)]) == 2
    assert "upgrade headwise" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in old.path.iterdir()} == before
    assert "upgrade headwise" in str(Run(old.path).problem)


def test_a_newer_study_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(f"format: {FORMAT + 1}\nvariants: {{a: {{}}}}\nseeds: [0]\n")
    with pytest.raises(HeadwiseError, match=r"study\.yaml has format"):
        Study.read(tmp_path)


def test_a_newer_file_is_told_as_such_whatever_it_holds(old: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(f"format: {FORMAT + 1}\nvariants: [a, b]\n")
    point = tmp_path / "step_00000001"
    point.mkdir()
    (point / "manifest.json").write_text(json.dumps({"format": checkpoint.FORMAT + 1, "blake3": []}))
    (old.path / "summary.json").write_text(json.dumps({"format": FORMAT + 1, "step": "the last"}))
    assert "upgrade headwise" in str(Run(old.path).problem)
    (old.path / "status.json").write_text(json.dumps({"format": FORMAT + 1, "state": {"is": "running"}}))
    assert "upgrade headwise" in str(Run(old.path).problem)
    for call in (
        lambda: Study.read(tmp_path), lambda: refuse_newer_plan(tmp_path), lambda: checkpoint.load(point),
        old.read_status, old.read_summary, lambda: old.write_status("running"),
    ):  # fmt: skip
        with pytest.raises(HeadwiseError, match=r"has format .* upgrade headwise"):
            call()


@pytest.mark.parametrize("variant", ["../../x", "/abs", "a/../../b"])
def test_a_plan_reads_nothing_outside_its_folder(tmp_path: Path, variant: str) -> None:
    (tmp_path / "study.yaml").write_text(json.dumps({"variants": {variant: {}}, "seeds": [0]}))
    with pytest.raises(HeadwiseError, match=r"study\.yaml names .* not a file inside"):
        Study.read(tmp_path)


def test_a_newer_part_of_the_head_table_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    columns = {"layer": np.zeros(2, int), "head": np.arange(2), "entropy": np.ones(2)}
    head_table.write_part(tmp_path, "a", columns)
    assert len(head_table.read(tmp_path)) == 2
    monkeypatch.setattr(head_table, "FORMAT", head_table.FORMAT + 1)
    head_table.write_part(tmp_path, "b", columns | {"part": "1"})
    monkeypatch.undo()
    with pytest.raises(HeadwiseError, match=r"b\.parquet has format 3 and this headwise reads up to 2"):
        head_table.read(tmp_path)
    part = tmp_path / "b.parquet"
    pq.write_table(pq.read_table(part).drop_columns(["token"]), part)  # which a newer one may do without
    for call in (head_table.read, lambda folder: head_table.read_columns(folder / "b.parquet", ["layer"])):
        with pytest.raises(HeadwiseError, match=r"b\.parquet has format 3 .* upgrade headwise"):
            call(tmp_path)


def test_what_was_evaluated_at_an_earlier_step_is_not_the_result(tmp_path: Path) -> None:
    summary = {
        "state": "diverged",
        "step": 10,
        "val_step": 0,
        "val_loss": 5.5,
        "val_accuracy": 0.1,
        "seed": 3,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert (Run(tmp_path).get("val_loss"), Run(tmp_path).get("val_accuracy")) == (None, None)
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"val_step": 10}))
    assert Run(tmp_path).get("val_loss") == 5.5
