"""Weights are never deleted where nothing else holds them, unless that is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from headwise.cli.main import main
from headwise.errors import HeadwiseError
from headwise.runs import checkpoint
from headwise.runs.delete import discard, may_delete, weights_in
from headwise.runs.folder import Outdated, RunFolder
from headwise.runs.store import pull, push
from tests.fixtures.runs import run_folder, train_on


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "runs" / "a" / "seed_0").path


def test_the_only_copy_is_refused_and_a_verified_one_lets_it_go(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["runs", "delete", str(run), "--yes"]) == 2
    assert "only copy of 1 file of weights" in capsys.readouterr().err
    push(run, tmp_path / "copy")
    assert main(["runs", "delete", str(run)]) == 2
    assert "pass --yes" in capsys.readouterr().err
    assert run.is_dir()
    assert main(["runs", "delete", str(run), "--yes"]) == 0
    assert f"weights are also at {tmp_path / 'copy'}" in capsys.readouterr().out
    assert not run.exists()
    pull(tmp_path / "copy", run)
    assert main(["runs", "delete", str(run), "--yes"]) == 0


def test_it_goes_where_that_is_asked_for(run: Path) -> None:
    assert main(["runs", "delete", str(run), "--yes", "--only-copy"]) == 0
    assert not run.exists()


def test_a_copy_counts_while_it_holds_the_same_weights(run: Path, tmp_path: Path) -> None:
    push(run, tmp_path / "copy")
    name = "checkpoints/step_00000010/model.safetensors"
    there, here = tmp_path / "copy" / name, run / name
    content = there.read_bytes()

    def damaged() -> None:
        there.write_bytes(content[:-1] + b"\7")

    def linked() -> None:
        there.unlink()
        there.hardlink_to(here)

    def gone() -> None:
        there.unlink()

    for spoil, message in (
        (damaged, "missing or damaged"),
        (linked, "is a link"),
        (gone, "missing or damaged"),
    ):
        spoil()
        with pytest.raises(HeadwiseError, match=f"only copy.*{message}"):
            may_delete([run])
        there.unlink(missing_ok=True)
        there.write_bytes(content)
    assert may_delete([run])[0].copy == str(tmp_path / "copy")
    here.write_bytes(content[:-1] + b"\7")
    with pytest.raises(HeadwiseError, match=r"only copy.*has no checkpoints/step_00000010/model"):
        may_delete([run])


def test_a_copy_that_is_to_be_deleted_too_does_not_count(run: Path, tmp_path: Path) -> None:
    push(run, tmp_path / "copy")
    pull(tmp_path / "copy", tmp_path / "runs" / "b")
    assert len(may_delete([run, tmp_path / "runs" / "b"])) == 2
    with pytest.raises(HeadwiseError, match="lies inside a folder that is to be deleted"):
        may_delete([run, tmp_path / "copy"])


def test_a_run_that_others_start_from_is_refused(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = run_folder(Path("runs/b/seed_0"), seed=1, source="runs/a/seed_0/checkpoints/step_00000010").path
    with pytest.raises(HeadwiseError, match=r"runs/b/seed_0 starts from .*--although-used"):
        may_delete([run], only_copy=True)
    assert len(may_delete([run], only_copy=True, although_used=True)) == 1
    assert len(may_delete([run, other], only_copy=True)) == 2


def test_what_is_no_run_or_runs_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    for folder, message in (
        (tmp_path / "absent", "is not a folder"), (tmp_path / "runs", "is not a run"),
        (tmp_path / "link", "is a link"), (run / "checkpoints", "is not a run"),
        (run_folder(tmp_path / "busy", state="running").path, "is running"),
    ):  # fmt: skip
        with pytest.raises(HeadwiseError, match=message):
            may_delete([folder], only_copy=True)


def test_what_never_took_a_step_is_discarded_and_weights_are_not(run: Path) -> None:
    with pytest.raises(HeadwiseError, match="only copy"):
        discard(run)
    assert weights_in(run) == ["checkpoints/step_00000010/model.safetensors"]
    shutil.rmtree(run / "checkpoints")
    first, _ = RunFolder(run).take(), RunFolder(run).take()
    discard(run)
    assert [path.name for path in run.iterdir()] == ["status.json"]
    with pytest.raises(Outdated):
        RunFolder(run, first).write_status("running")


def test_pruning_keeps_the_last_by_number_and_everything_where_the_best_is_unknown(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", step=99_999_999 % 200)
    shutil.rmtree(folder.checkpoints)
    for step in (5, 99_999_999, 100_000_000):
        (folder.checkpoints / checkpoint.folder_name(step)).mkdir(parents=True)
    assert checkpoint.latest(folder.checkpoints).name == "step_100000000"
    (folder.checkpoints / "best.json").write_text("{")
    checkpoint.prune(folder.checkpoints, 1)
    assert len(list(folder.checkpoints.glob("step_*"))) == 3
    checkpoint.mark_best(folder.checkpoints, "step_00000005", 2.0)
    checkpoint.prune(folder.checkpoints, 1)
    assert sorted(path.name for path in folder.checkpoints.glob("step_*")) == [
        "step_00000005",
        "step_100000000",
    ]


def test_a_run_that_went_on_after_its_push_is_the_only_copy_again(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", state="interrupted")
    push(folder.path, tmp_path / "copy")
    train_on(folder, 20)
    with pytest.raises(HeadwiseError, match=r"has no checkpoints/step_00000020"):
        may_delete([folder.path])
