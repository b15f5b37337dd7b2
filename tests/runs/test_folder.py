"""A run folder: claimed once, its log readable after a kill, its state told from signs of life."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from headwise.errors import HeadwiseError
from headwise.runs.folder import METRICS, STALE_S, RunFolder, state_of


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.start("seed: 1\n")
    return folder


def test_a_folder_is_claimed_once(folder: RunFolder) -> None:
    with pytest.raises(HeadwiseError, match="holds another run; pass --resume"):
        folder.start("seed: 2\n")
    assert folder.config.read_text() == "seed: 1\n"


@pytest.mark.parametrize("kind", ["a folder with files", "a file", "below a file"])
def test_what_is_no_run_folder_is_left_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "precious").write_text("data")
    path = {"a folder with files": tmp_path, "a file": tmp_path / "precious"}.get(kind)
    with pytest.raises(HeadwiseError, match=r"no run folder|cannot write to --out"):
        RunFolder(path or tmp_path / "precious" / "run").start("seed: 1\n")
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_rows_come_back_as_written(folder: RunFolder) -> None:
    folder.append_metrics([{"step": 0, "split": "val", "loss": 0.1 + 0.2, "accuracy": None}])
    folder.append_metrics([{"step": 1, "split": "train", "loss": 1e-30}])
    first, second = folder.read_metrics()
    assert tuple(first) == METRICS
    assert (float(first["loss"]), first["accuracy"], first["lr"]) == (0.1 + 0.2, "", "")
    assert float(second["loss"]) == 1e-30


@pytest.mark.parametrize("cut", [1, 2, 5, 40])
def test_a_line_that_a_kill_cut_short_is_left_out(folder: RunFolder, cut: int) -> None:
    rows = [{"step": s, "split": "train"} | dict.fromkeys(METRICS[2:], 0.123456) for s in (1, 2)]
    folder.append_metrics(rows)
    folder.metrics.write_bytes(folder.metrics.read_bytes()[:-cut])
    assert [row["step"] for row in folder.read_metrics()] == ["1"]


def test_a_full_disk_is_one_clear_line(folder: RunFolder) -> None:
    folder.metrics.symlink_to("/dev/full")
    folder.log.symlink_to("/dev/full")
    with pytest.raises(HeadwiseError, match=r"disk is full: .*metrics\.csv"):
        folder.append_metrics([{"step": 1, "split": "train"}])
    with pytest.raises(HeadwiseError, match=r"disk is full: .*log\.txt"):
        folder.say("started")


def test_a_resume_forgets_what_came_after_its_checkpoint(folder: RunFolder) -> None:
    folder.append_metrics([{"step": s, "split": "train", "loss": s / 3} for s in (5, 10, 15)])
    with folder.metrics.open("a") as file:
        file.write("20,tra")
    for name in ("heads/step_00000010.parquet", "heads/step_00000015.parquet", "maps/step_00000015.npz",
                 "checkpoints/.step_00000015.abcd1234.draft/step_00000015/model.safetensors",
                 ".status.json.abcd1234.draft/status.json"):  # fmt: skip
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).touch()
    folder.write_summary({"state": "finished"})
    kept = folder.metrics.read_bytes().splitlines(keepends=True)[:3]
    folder.drop_after(10)
    assert folder.metrics.read_bytes() == b"".join(kept)
    left = sorted(p.relative_to(folder.path).as_posix() for p in folder.path.rglob("*") if p.is_file())
    assert left == ["config.yaml", "heads/step_00000010.parquet", "metrics.csv"]


def test_status_keeps_what_is_not_given_again(folder: RunFolder) -> None:
    folder.write_status("running", started=1.0, max_steps=10)
    folder.write_status("finished", step=10)
    status = folder.read_status()
    assert (status["state"], status["started"], status["step"], status["pid"]) == (
        "finished",
        1.0,
        10,
        os.getpid(),
    )
    with pytest.raises(ValueError, match="done"):
        folder.write_status("done")


GONE = 2**22 + 1  # a process id above Linux's largest


@pytest.mark.parametrize(
    ("host", "pid", "age", "state"),
    [
        ("here", None, 0.0, "running"),
        ("here", GONE, 0.0, "interrupted"),
        ("here", None, 2 * STALE_S, "interrupted"),  # the id lives on in another process
        ("another", GONE, 0.0, "running"),
        ("another", GONE, 2 * STALE_S, "interrupted"),
    ],
)
def test_a_run_without_a_sign_of_life_is_interrupted(
    host: str, pid: int | None, age: float, state: str
) -> None:
    status: dict[str, Any] = {
        "host": socket.gethostname() if host == "here" else host,
        "pid": pid or os.getpid(),
        "heartbeat": time.time() - age,
    }
    assert state_of(status | {"state": "running"}) == state
    assert state_of(status | {"state": "timed_out"}) == "timed_out"
    assert state_of({}) == "planned"


def test_missing_and_damaged_files_say_so(folder: RunFolder) -> None:
    with pytest.raises(HeadwiseError, match="has no summary"):
        folder.read_summary()
    folder.summary.write_text('{"state": ')
    with pytest.raises(HeadwiseError, match="cannot be read"):
        folder.read_summary()
