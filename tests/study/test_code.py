"""The axis `code`: each run executes its revision alone, and the user's repository stays as it is."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from headwise.cli.main import main
from headwise.errors import HeadwiseError
from headwise.files import write_json
from headwise.runs.read import Study as Planned
from headwise.study.code import Code, moved, worktree
from headwise.study.executor import run_all, state
from headwise.study.local import Local
from headwise.study.plan import PlannedRun, plan, write_plan
from headwise.study.study import Study
from tests.fixtures.history import History, history

BASE = {
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "data": {"name": "copy", "seq_len": 8, "batch_size": 2, "vocab_size": 8, "eval_sequences": 2},
    "training": {"max_steps": 3, "warmup_steps": 1, "eval_every": 0, "checkpoint_every": 0},
}


@pytest.fixture
def made(tmp_path: Path) -> History:
    return history(tmp_path / "my repo")


def study(made: History, *revisions: str, **values: object) -> Study:
    found = Study("s", base=BASE, axes={"code": list(revisions)}, seeds=[0], device="cpu")
    found.code_repository = str(made.path)
    for name, value in values.items():
        setattr(found, name, value)
    found.validate()
    return found


def quiet(runs: Sequence[PlannedRun]) -> None:
    pass


def code_of(run: PlannedRun) -> Code:
    assert run.code is not None
    return run.code


def test_each_run_executes_its_revision_and_the_user_s_files_stay(
    made: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = made.small_headwise("old", 1.0)
    made.git("tag", "v1")
    new = made.small_headwise("new", 5.0)
    (made.path / "headwise" / "cli" / "main.py").write_text("raise SystemExit('the user is writing this')")
    (made.path / ".git" / "hooks" / "post-checkout").write_text("#!/bin/sh\ntouch hooked\n")
    (made.path / ".git" / "hooks" / "post-checkout").chmod(0o755)
    before = made.state()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    one = study(made, "v1", "main")
    runs = plan(one, tmp_path / "out")
    assert [run.variant for run in runs] == [f"run@code={old[:8]}", f"run@code={new[:8]}"]
    folder = write_plan(one, runs, tmp_path / "out")
    assert run_all(runs, Local(2), show=quiet)
    for run, sha, written in zip(runs, (old, new), ("v1", "main"), strict=True):
        assert state(run) == "finished", run.folder.read_status()
        facts = run.folder.read_environment()["code"]
        assert facts == {
            "commit": sha, "revision": written, "repository": str(made.path), "user_dirty": True
        }  # fmt: skip
    assert [round(run.folder.read_summary()["val_loss"] / 4) for run in runs] == [0, 1]
    assert made.state() == before
    assert not list(tmp_path.rglob("hooked"))
    variants = Planned.read(folder).variants
    assert [variant["label"] for variant in variants.values()] == ["run (code=v1)", "run (code=main)"]
    assert [variant["code"]["subject"] for variant in variants.values()] == ["old", "new"]
    given = Path(code_of(runs[0]).folder, "given", runs[0].variant, "seed_0.yaml").read_text()
    assert "max_steps: 3" in given
    assert "measure" not in given  # the study sets none of it, and this revision refuses it
    assert all(state(run) == "finished" for run in plan(study(made, "v1", "main"), tmp_path / "out"))
    made.commit("newer")
    again = study(made, "v1", "main")
    plan(again, tmp_path / "out")
    assert any("main was" in line for line in moved(again, tmp_path / "out"))


def test_what_a_revision_refuses_or_lacks_fails_its_run_alone(
    made: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.small_headwise("good", 1.0)
    made.commit("needs helper", {"headwise/cli/main.py": "import helper_of_revision"})
    made.git("rm", "-q", "-r", "headwise")
    made.commit("no headwise")
    made.git("checkout", "-q", "main~1", "--", "headwise")
    made.commit("broken", {"headwise/cli/main.py": "x = = 1"})
    made.small_headwise("last", 1.0)
    (made.path / "lib").mkdir()
    (made.path / "lib" / "helper_of_revision.py").write_text("")  # the user has it, no commit does
    monkeypatch.syspath_prepend(str(made.path / "lib"))
    one = study(made, "main~4", "main~3", "main~2", "main~1", "main")
    one.base = BASE | {"measure": {"maps": 0}}
    runs = plan(one, tmp_path / "out")
    assert run_all(runs, Local(2), show=quiet)
    assert {state(run) for run in runs} == {"failed"}
    reasons = [str(run.folder.read_status()["reason"]) for run in runs]
    assert reasons[0] == reasons[4] == "unknown key 'measure'"
    assert "No module named 'helper_of_revision' at this revision" in reasons[1]
    assert "has no headwise/__init__.py" in reasons[2]
    assert "SyntaxError" in reasons[3]


class Stop:
    """Stops a run that waits: with Ctrl-C, or by killing its worker."""

    def __init__(self, how: str) -> None:
        self.how, self.child = how, 0

    def __call__(self, runs: Sequence[PlannedRun]) -> None:
        import multiprocessing

        status = runs[0].folder.read_status()
        if self.child or status["state"] != "running":
            return
        self.child = status["pid"]
        if self.how == "Ctrl-C":
            raise KeyboardInterrupt
        for worker in multiprocessing.active_children():
            if worker.pid:
                os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["Ctrl-C", "kill"])
def test_a_stopped_run_ends_with_its_worker_and_is_continued(made: History, tmp_path: Path, how: str) -> None:
    made.small_headwise("waits", 1.0, waits=True)
    [run] = plan(study(made, "main"), tmp_path / "out")
    stop = Stop(how)
    assert run_all([run], Local(1), show=stop) is (how == "kill")
    ends = time.monotonic() + 30
    while _lives(stop.child) and time.monotonic() < ends:
        os.sched_yield()
    assert not _lives(stop.child)
    assert state(run) == "interrupted"
    assert (run.folder.read_status()["reason"] == "asked to stop") is (how == "Ctrl-C")
    [run] = plan(study(made, "main"), tmp_path / "out")
    assert run_all([run], Local(1), show=quiet)
    assert state(run) == "finished"
    assert run.folder.log.read_text() == "started\nresumed\n"


def _lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_working_tree_is_made_once_repaired_and_never_taken_from_the_user(
    made: History, tmp_path: Path
) -> None:
    sha = made.commit("one", {"a.py": "1"})
    code = Code(str(made.path), str(tmp_path / "trees"), sha, "main", False, False, {})
    tree = worktree(code)
    mark = tree.with_name(f"{tree.name}.json")
    number = tree.stat().st_ino
    made.git("worktree", "prune", "--expire=now")
    assert worktree(code).stat().st_ino == number
    mark.unlink()  # as a kill leaves it
    (tree / "a.py").unlink()
    assert (worktree(code) / "a.py").read_text() == "1"
    tree.rename(tmp_path / "gone")  # as a user does who removes it without git
    assert (worktree(code) / "a.py").read_text() == "1"
    (tree / "a.py").write_text("changed")
    with pytest.raises(HeadwiseError, match="its files were changed"):
        worktree(code)
    assert (tree / "a.py").read_text() == "changed"
    (tree / "a.py").write_text("1")
    (tree / ".git").unlink()
    with pytest.raises(HeadwiseError, match="delete that folder"):
        worktree(code)
    mark.write_text("{")
    worktree(code)
    write_json(mark, {"commit": "0" * 40, "repository": "x"})
    assert (worktree(code) / "a.py").read_text() == "1"


def test_studies_whose_revisions_cannot_be_compared_are_refused(made: History, tmp_path: Path) -> None:
    made.commit("one")
    made.git("tag", "v1")
    made.commit("format 99", {"headwise/runs/folder.py": "FORMAT = 99\n"})
    for wrong, message in [
        (study(made, "v1", "mani"), "did you mean 'main'"),
        (study(made, "v1", "main~1"), "are one commit"),
        (study(made, "main"), "format 99"),
        (study(made, "v1", fit_batch=True), "fit_batch"),
        (study(made, "v1", memory_limit="1GB"), "memory_limit"),
        (study(made, "v1", axes={"data.seq_len": [8]}), "no axis code"),
        (study(made, "v1", code_repository=str(tmp_path)), "not in a git repository"),
    ]:
        with pytest.raises(HeadwiseError, match=message):
            plan(wrong, tmp_path / "out")
    with pytest.raises(HeadwiseError, match="list of different values"):
        study(made, "v1", "v1")
    assert not (tmp_path / "out").exists()


PLUGIN = """
from headwise.attention.flash import FlashAttention
from headwise.attention.kinds import register

@register("of_revision")
class OfRevision(FlashAttention):
    pass
"""


def test_a_kind_of_the_user_s_repository_trains_as_it_was(
    made: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from headwise.attention.kinds import KINDS, LOADED

    made.commit("the kind", {"kind_of_revision.py": PLUGIN + "print('as committed', file=open('ran', 'w'))"})
    (made.path / "kind_of_revision.py").write_text(PLUGIN)
    model = BASE["model"] | {"attention": {"kind": "of_revision"}}
    (made.path / "s.yaml").write_text(json.dumps({
        "plugins": ["kind_of_revision"],
        "base": BASE | {"model": model, "measure": {"maps": 0, "heads": False}},
        "axes": {"code": ["main"]}, "seeds": [0], "device": "cpu",
    }))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    try:
        assert main(["study", str(made.path / "s.yaml"), "--out", "out"]) == 0
    finally:
        KINDS.pop("of_revision", None)
        LOADED[:] = [name for name in LOADED if name != "kind_of_revision"]
    assert "no run contains them" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "s" / ".code").glob("*/ran"))) == 1
    assert not (made.path / "ran").exists()
