"""The index of runs never tells anything else than the folders, and can always go."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from headwise.cli.main import main
from headwise.runs import index
from headwise.runs.folder import RunFolder
from headwise.runs.index import INDEX, listed
from headwise.runs.read import find_runs
from tests.fixtures.runs import run_folder, train_on

COLUMNS = (
    "state",
    "reason",
    "kind",
    "seed",
    "step",
    "val_loss",
    "data_checksum",
    "engine",
    "data",
    "init_from",
    "other",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed in range(4):
        run_folder(tmp_path / "runs" / "a" / f"seed_{seed}", seed=seed)
    RunFolder(tmp_path / "runs" / "skipped").write_status("skipped", reason="no GPU")
    listed(tmp_path / "runs", least=1, settled_s=0)
    assert (tmp_path / "runs" / INDEX).is_file()
    return tmp_path / "runs"


def told(root: Path, runs: list) -> list[tuple]:
    return [(str(run.path), *(run.get(name) for name in COLUMNS)) for run in runs]


def test_it_tells_what_the_folders_tell(root: Path) -> None:
    assert told(root, listed(root)) == told(root, find_runs(root))
    assert [run.get("state") for run in listed(root)] == ["finished"] * 4 + ["skipped"]


def test_runs_come_from_it_without_their_files_being_read(root: Path) -> None:
    for run in listed(root):
        assert {"status", "summary", "facts", "problem"} <= set(vars(run))
        assert not {"config", "env", "metrics"} & set(vars(run))


@pytest.mark.parametrize("name", index.FILES)
def test_a_file_that_changed_is_read_again(root: Path, name: str) -> None:
    path = root / "a" / "seed_1" / name
    before = path.stat()
    path.write_bytes(b"\xff" + path.read_bytes()[1:])  # the same size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    states = [run.state for run in listed(root)]
    assert states == ["finished", "failed", "finished", "finished", "skipped"]
    path.unlink()
    assert told(root, listed(root)) == told(root, find_runs(root))


def test_a_run_that_went_on_or_is_new_or_gone(root: Path) -> None:
    train_on(RunFolder(root / "a" / "seed_0"), 30, val_loss=1.5)
    run_folder(root / "b")
    shutil.rmtree(root / "a" / "seed_3")
    found = listed(root)
    assert told(root, found) == told(root, find_runs(root))
    assert found[0].get("step") == 30


def test_a_running_run_whose_process_is_gone_is_interrupted(root: Path) -> None:
    RunFolder(root / "live").write_status("running", step=1)
    dead = RunFolder(root / "dead")
    dead.write_status("running", step=1)
    status = json.loads((dead.path / "status.json").read_text()) | {"pid": 2**30}
    (dead.path / "status.json").write_text(json.dumps(status))
    silent = json.loads((dead.path / "status.json").read_text()) | {
        "host": "elsewhere",
        "heartbeat": time.time() - 59.8,
    }
    RunFolder(root / "silent").write_status("running")
    (root / "silent" / "status.json").write_text(json.dumps(silent))
    listed(root, least=1, settled_s=0)
    while time.time() - silent["heartbeat"] < 60:
        assert len(listed(root)) == 8  # one of them was running when it was read for the index
    states = {run.path.name: run.state for run in listed(root)}
    assert states == states | {"live": "running", "dead": "interrupted", "silent": "interrupted"}


def test_a_file_that_just_changed_is_not_kept(root: Path) -> None:
    (root / INDEX).unlink()
    listed(root, least=1, settled_s=1000)
    assert len((root / INDEX).read_bytes()) < 50


@pytest.mark.parametrize("content", [
    b"", b"x", index.FORMAT, index.FORMAT + b"\xc1", index.FORMAT + b"\x81\xa1a\x92\x90\xc4\x00",
    b"headwise-index 9\n\x80",
])  # fmt: skip
def test_a_damaged_index_is_ignored(root: Path, content: bytes) -> None:
    whole = told(root, find_runs(root))
    (root / INDEX).write_bytes(content)
    assert told(root, listed(root)) == whole


def test_every_byte_of_it_may_be_damaged(root: Path) -> None:
    whole = told(root, find_runs(root))
    original = (root / INDEX).read_bytes()
    for place in range(0, len(original), max(1, len(original) // 60)):
        (root / INDEX).write_bytes(original[:place])
        assert told(root, listed(root)) == whole


def test_an_index_in_a_copied_folder_does_not_count(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copied", copy_function=shutil.copy2)
    before = index._read(tmp_path / "copied")
    assert len(before) == 5
    start = len(str(tmp_path / "copied")) + 1
    places = [str(run.path) for run in find_runs(tmp_path / "copied")]
    stamps = {place[start:]: index._stamps(place) for place in places}
    assert all(before[place].stamps != now for place, now in stamps.items())


def test_a_number_beyond_64_bits_is_read_each_time(root: Path) -> None:
    train_on(RunFolder(root / "a" / "seed_0"), 30, flops=10**30)
    assert listed(root, least=1, settled_s=0)[0].get("flops") == 10**30
    assert listed(root)[0].get("flops") == 10**30


def test_no_index_where_there_are_few_runs_or_it_cannot_be_written(root: Path, tmp_path: Path) -> None:
    (root / INDEX).unlink()
    assert main(["runs", str(root)]) == 0
    assert not (root / INDEX).exists()
    (root / INDEX).mkdir()
    (root / INDEX / "x").write_text("")
    assert len(listed(root, least=1, settled_s=0)) == 5


def test_the_current_folder_has_runs_under_their_own_names(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    (root / "a").rename(root / "xs")
    (root / "skipped").rename(root / "ys")  # alike but for their first letter
    assert main(["runs", ".", "--json"]) == 0
    assert [run["run"] for run in json.loads(capsys.readouterr().out)] == [
        *(f"xs/seed_{seed}" for seed in range(4)),
        "ys",
    ]  # fmt: skip
    listed(".", least=1, settled_s=0)
    assert all("problem" in vars(run) and "config" not in vars(run) for run in listed("."))
