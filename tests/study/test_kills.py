"""A study survives the death of its workers, of itself, and a second study on its folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headwise.cli.study import LOCK, carry_out
from headwise.errors import HeadwiseError
from headwise.files import alone
from headwise.study.executor import next_run, run_all, state
from headwise.study.local import Local
from headwise.study.plan import PlannedRun, plan
from headwise.study.study import Study, Variant

BASE = {
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "data": {"name": "copy", "seq_len": 8, "batch_size": 2, "vocab_size": 8, "eval_sequences": 2},
    "training": {"max_steps": 3, "warmup_steps": 1, "eval_every": 0, "checkpoint_every": 0},
    "measure": {"heads": False, "maps": 0},
}


def study(**values: Any) -> Study:
    made = Study("demo", base=BASE, variants={"flash": Variant()}, seeds=[0], device="cpu")
    for name, value in values.items():
        setattr(made, name, value)
    made.validate()
    return made


class Killer:
    """Kills the first worker that it sees, at once or when its run has begun."""

    def __init__(self, *, begun: bool) -> None:
        self.begun, self.killed = begun, 0

    def __call__(self, runs: Sequence[PlannedRun]) -> None:
        for worker in multiprocessing.active_children():
            if not self.killed and worker.pid and (not self.begun or runs[0].folder.holds_run()):
                os.kill(worker.pid, signal.SIGKILL)
                self.killed = worker.pid


@pytest.mark.parametrize("begun", [False, True])
def test_a_killed_worker_is_interrupted_and_the_next_study_continues_it(tmp_path: Path, begun: bool) -> None:
    one = study()
    if begun:
        one.base = BASE | {"training": BASE["training"] | {"max_steps": 100_000}}
    [run] = plan(one, tmp_path)
    killer = Killer(begun=begun)
    assert run_all([run], Local(1), show=killer)
    assert killer.killed
    assert state(run) == "interrupted"
    assert "killed (SIGKILL)" in run.folder.read_status()["reason"]
    if not begun:
        assert not run.folder.holds_run()
        assert run_all([run], Local(1), show=lambda _: None)
        assert state(run) == "finished"
    else:
        assert next_run([run]) is run


def test_a_run_of_another_process_is_waited_for(tmp_path: Path) -> None:
    first, second = plan(study(seeds=[0, 1]), tmp_path)
    other = {"pid": os.getppid(), "host": socket.gethostname(), "heartbeat": time.time()}
    first.folder.write_status("running")
    (first.folder.path / "status.json").write_text(json.dumps({"state": "running"} | other))
    waiting = [first, second]
    assert next_run(waiting) is second
    assert next_run(waiting) is None
    assert waiting == [first]
    first.folder.write_status("interrupted")
    assert next_run(waiting) is first


def test_a_second_study_on_the_folder_names_the_first(tmp_path: Path) -> None:
    lock = tmp_path / "demo" / LOCK
    with (
        alone(lock, "works on the study"),
        pytest.raises(
            HeadwiseError, match=rf"another process works on the study .*\(process {os.getpid()} of"
        ),
    ):
        carry_out(study(), tmp_path)
    assert list(lock.parent.iterdir()) == []


def test_a_lock_does_not_outlive_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    pid = os.fork()
    if pid == 0:
        with alone(lock, "works"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert lock.exists()
    with alone(lock, "works"):
        pass
    assert not lock.exists()


def test_whoever_waits_gets_the_lock_of_the_file_that_is_there(tmp_path: Path) -> None:
    """A holder deletes the file: those who opened it before must not hold it beside those who come after."""
    inside, most = [], []

    def work() -> None:
        for _ in range(50):
            with alone(tmp_path / "lock", "works", wait=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (200, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../x", "/abs", ".", "..", "", "a\0b", "x" * 300, "~"])
def test_a_study_that_leaves_its_folder_is_refused(name: str) -> None:
    with pytest.raises(HeadwiseError, match=r"^study .* cannot name a folder"):
        study(name=name)


@pytest.mark.parametrize("name", ["../x", "/abs", "", "report.md", "Figures", "a@b", "seed_1", "config.yaml"])
def test_a_variant_that_is_no_folder_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(HeadwiseError, match=r"^variant .* cannot name a folder"):
        study(variants={"flash": Variant(), name: Variant()})


def test_variants_that_fall_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match="'flash' and 'Flash' would share the folder"):
        study(variants={"flash": Variant(), "Flash": Variant()})
    axes = {"data.path": ["a/b", "a_b"]}
    with pytest.raises(HeadwiseError, match=r"@path='a/b'.* and .*@path='a_b'.* would share the folder"):
        plan(study(axes=axes), tmp_path)
