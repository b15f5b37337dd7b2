"""Runs are found by reading folders, and what the folders say is judged, damaged or not."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from headwise.errors import HeadwiseError
from headwise.measures import table as head_table
from headwise.runs.folder import RunFolder
from headwise.runs.read import Run, Study, Unreadable, find_runs

HEADER = "step,split,loss,smooth_loss\n"


def make_run(path: Path, state: str = "finished", **summary: object) -> Path:
    folder = RunFolder(path)
    folder.start(yaml.safe_dump({"model": {"attention": {"kind": "mha"}}, "seed": 3}))
    folder.write_status(state, step=10)
    folder.append_metrics([{"step": s, "split": "train", "loss": 1.0 / s} for s in (5, 10)])
    if state == "finished":
        folder.write_summary({"state": state, "kind": "mha", "seed": 3, "val_loss": 1.5} | summary)
    return path


def test_find_runs_looks_everywhere_but_inside_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "study" / "mha" / "seed_0")
    make_run(tmp_path / "single")
    make_run(tmp_path / "single" / "checkpoints" / "step_10")  # not a run of its own
    make_run(tmp_path / ".draft" / "seed_0")
    (tmp_path / "empty").mkdir()
    found = find_runs(tmp_path)
    assert [run.path.relative_to(tmp_path).as_posix() for run in found] == ["single", "study/mha/seed_0"]
    assert [run.variant for run in found] == [None, "mha"]


def test_reads_what_a_run_wrote(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "run", val_loss=1.25))
    assert (run.state, run.reason, run.seed) == ("finished", "", 3)
    assert run.get("val_loss") == 1.25
    assert run.get("kind") == "mha"
    steps, losses = run.curve("train", "loss")
    assert steps.tolist() == [5, 10]
    assert losses.tolist() == [0.2, 0.1]
    assert run.curve("train", "no_such_column")[0].size == 0
    assert run.heads is None


def test_kind_and_seed_are_known_before_a_summary_exists(tmp_path: Path) -> None:
    make_run(tmp_path / "seed_7", state="failed")
    run = Run(tmp_path / "seed_7")
    assert (run.get("kind"), run.seed, run.get("step")) == ("mha", 7, 10)


def test_running_with_a_beating_heart(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", state="running")
    assert Run(path).state == "running"


def test_stale_heartbeat_elsewhere_reads_as_interrupted(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", state="running")
    status = {"state": "running", "host": "another", "pid": 1, "heartbeat": time.time() - 61}
    (path / "status.json").write_text(json.dumps(status))
    assert Run(path).state == "interrupted"
    assert "61 s" in Run(path).reason
    (path / "status.json").write_text(json.dumps(status | {"heartbeat": time.time() - 30}))
    assert Run(path).state == "running"


def test_dead_process_on_this_host_reads_as_interrupted(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    path = make_run(tmp_path / "run", state="running")
    status = {"state": "running", "host": socket.gethostname(), "pid": pid, "heartbeat": time.time()}
    (path / "status.json").write_text(json.dumps(status))
    assert Run(path).state == "interrupted"
    assert f"process {pid} is gone" in Run(path).reason


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b'{"val_loss": 1.'),
        ("summary.json", b"[1, 2]"),
        ("status.json", b"\xff\xfe\x00garbage"),
        ("status.json", b'{"state": "dancing"}'),
        ("status.json", b'{"state": "running", "heartbeat": "yesterday"}'),
        ("config.yaml", b"model: [unclosed"),
        ("metrics.csv", b"what is this\n1,2,3\n"),
        ("metrics.csv", b"step,split,loss\nfive,train,1.0\n"),
    ],
)
def test_a_damaged_file_makes_the_run_failed_with_the_reason(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = make_run(tmp_path / "run")
    (path / name).write_bytes(content)
    run = Run(path)
    assert run.state == "failed"
    assert run.reason.startswith(f"unreadable {name}")
    assert run.get("no_such_field") is None


def test_finished_without_a_summary_is_failed(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "summary.json").unlink()
    assert Run(path).state == "failed"
    assert "summary.json" in Run(path).reason


def test_damaged_head_table_raises_only_when_read(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "heads").mkdir()
    (path / "heads" / "step_00000010.parquet").write_bytes(b"PAR1 cut off")
    run = Run(path)
    assert run.state == "finished"
    with pytest.raises(Unreadable, match="unreadable heads"):
        _ = run.heads


def test_heads_are_the_head_table(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    columns = {
        "step": 10,
        "layer": np.array([0, 0]),
        "head": np.array([0, 1]),
        "entropy": np.array([1.0, 2.0]),
    }
    head_table.write_part(path / "heads", "step_00000010", columns)
    assert Run(path).heads["entropy"].to_list() == [1.0, 2.0]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "metrics.csv").write_text(HEADER + "1,train,2.0,\n2,train,1.5,1.9\n3,tra")
    steps, losses = Run(path).curve("train", "loss")
    assert (steps.tolist(), losses.tolist()) == ([1, 2], [2.0, 1.5])
    assert Run(path).curve("train", "smooth_loss")[0].tolist() == [2]


def test_a_repeated_step_counts_once_and_the_later_line_wins(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    lines = "1,train,2.0,\n2,train,1.5,\n2,val,1.4,\n2,train,1.6,\n3,train,1.2,\n"
    (path / "metrics.csv").write_text(HEADER + lines)
    steps, losses = Run(path).curve("train", "loss")
    assert (steps.tolist(), losses.tolist()) == ([1, 2, 3], [2.0, 1.6, 1.2])


def test_study_lists_runs_that_have_not_started(tmp_path: Path) -> None:
    plan = {
        "name": "s",
        "baseline": "flash",
        "seeds": [0, 1],
        "variants": {"flash": {"kind": "flash"}, "mha": {}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    make_run(tmp_path / "flash" / "seed_0")
    make_run(tmp_path / "flash" / "seed_9")
    study = Study.read(tmp_path)
    states = [(run.variant, run.path.name, run.state) for run in study.runs]
    assert states == [
        ("flash", "seed_0", "finished"), ("flash", "seed_1", "planned"), ("flash", "seed_9", "finished"),
        ("mha", "seed_0", "planned"), ("mha", "seed_1", "planned"),
    ]  # fmt: skip
    assert (study.name, study.baseline) == ("s", "flash")


def test_a_folder_without_a_plan_is_a_study_of_what_lies_in_it(tmp_path: Path) -> None:
    for variant, kind in (("a", "mha"), ("b", "flash")):
        for seed in (0, 1):
            make_run(tmp_path / variant / f"seed_{seed}", seed=seed, kind=kind)
    make_run(tmp_path / "loose")
    study = Study.read(tmp_path)
    assert list(study.variants) == ["a", "b", "loose"]
    assert (study.baseline, study.plan["seeds"]) == ("b", [0, 1, 3])


def test_a_single_run_is_a_study_of_one(tmp_path: Path) -> None:
    study = Study.read(make_run(tmp_path / "copy"))
    assert [(run.variant, run.state) for run in study.runs] == [("copy", "finished")]


def test_study_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match="no folder"):
        Study.read(tmp_path / "absent")
    with pytest.raises(HeadwiseError, match="no runs below"):
        Study.read(tmp_path)
    (tmp_path / "study.yaml").write_text("name: [")
    with pytest.raises(HeadwiseError, match=r"unreadable study\.yaml") as error:
        Study.read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["seed_²", "seed_①", "seed_", "seed_" + "9" * 200])
def test_a_folder_whose_number_is_none_is_a_run_without_a_seed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a" / name
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "failed"}')
    (run,) = find_runs(tmp_path)
    assert run.seed is None
    assert Study.read(tmp_path).plan["seeds"] == []


@pytest.mark.parametrize("line", ["2,train,3.0\n", "2,train,3.0,1,1\n"])
def test_a_line_with_more_or_fewer_cells_than_columns_is_told(tmp_path: Path, line: str) -> None:
    folder = make_run(tmp_path / "run", state="failed")
    (folder / "metrics.csv").write_text(HEADER + "1,train,2.0,2.0\n" + line)
    assert str(Run(folder).problem).startswith("unreadable metrics.csv: line 3 has")
