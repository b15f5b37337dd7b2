"""The driver: every run ends in one state, lost ones start again, outdated workers write nothing."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.cli.executors import Where
from headwise.config.run import Config, from_dict
from headwise.errors import HeadwiseError
from headwise.runs.folder import Outdated, RunFolder, state_of
from headwise.study.executor import TRIES, Ending, Resources, executor_named, parcel, run_all, state
from headwise.study.expand import places
from headwise.study.host import host
from headwise.study.plan import PlannedRun, configure
from headwise.study.study import Study, Variant
from headwise.study.work import work
from headwise.training.progress import Silent
from headwise.training.run import train

TINY = {
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "data": {"name": "copy", "seq_len": 8, "batch_size": 2, "vocab_size": 8, "eval_sequences": 2},
    "training": {"max_steps": 3, "warmup_steps": 1, "eval_every": 0, "checkpoint_every": 0},
    "measure": {"heads": False, "maps": 0},
}


@functools.cache
def tiny() -> Config:
    return from_dict(TINY)


def planned(root: Path, number: int) -> list[PlannedRun]:
    config = tiny()
    return [
        PlannedRun("flash", dataclasses.replace(config, out=str(root / f"seed_{seed}"), seed=seed))
        for seed in range(number)
    ]


class Unsteady:
    """An executor whose runs end as told: each a list of what becomes of its attempts."""

    def __init__(self, fates: dict[str, list[str]], places: int) -> None:
        self.fates, self.places = fates, places
        self.active: list[tuple[PlannedRun, str]] = []
        self.most = 0

    def room(self) -> bool:
        return len(self.active) < self.places

    def submit(self, run: PlannedRun) -> None:
        assert all(run.folder.path != other.folder.path for other, _ in self.active)
        self.active.append((run, self.fates[run.folder.path.name].pop(0)))
        self.most = max(self.most, len(self.active))

    def poll(self, wait_s: float) -> list[Ending]:
        ended, self.active = self.active, []
        for run, fate in ended:
            if fate in ("finished", "failed"):
                run.folder.write_status(fate, reason="it says so")
        return [Ending(run, "interrupted", f"was {fate}", lost=fate == "lost") for run, fate in ended]

    def stop(self) -> None:
        self.active = []


FATES = st.lists(st.sampled_from(["lost", "silent", "finished", "failed"]), min_size=TRIES, max_size=TRIES)


@settings(max_examples=20)
@given(st.lists(FATES, min_size=1, max_size=4), st.integers(1, 3))
def test_every_run_ends_in_one_state_and_a_lost_one_starts_again(
    tmp_path_factory: pytest.TempPathFactory, fates: list[list[str]], room: int
) -> None:
    runs = planned(tmp_path_factory.mktemp("runs"), len(fates))
    executor = Unsteady({f"seed_{seed}": list(fate) for seed, fate in enumerate(fates)}, room)
    assert run_all(runs, executor, show=lambda _: None)
    assert executor.most <= room
    for run, fate in zip(runs, fates, strict=True):
        attempts = next((n for n, one in enumerate(fate, 1) if one != "lost"), TRIES)
        last = fate[attempts - 1]
        assert state(run) == {"lost": "interrupted", "silent": "interrupted"}.get(last, last)
        assert run.folder.read_status()["attempt"] == attempts


def test_what_failed_in_an_earlier_round_of_a_command_is_not_run_again_in_the_next(tmp_path: Path) -> None:
    runs = planned(tmp_path, 2)
    executor = Unsteady({"seed_0": ["failed", "finished"], "seed_1": ["finished"]}, 2)
    assert run_all(runs[:1], executor, show=lambda _: None)
    assert run_all(runs, executor, show=lambda _: None, before=runs[:1])
    assert [state(run) for run in runs] == ["failed", "finished"]
    assert run_all(runs, executor, show=lambda _: None)
    assert state(runs[0]) == "finished", "another command runs it again"


def test_a_trial_that_no_worker_got_to_is_still_to_come(tmp_path: Path) -> None:
    """A node without the package says nothing about a setting."""
    run, trial = planned(tmp_path, 2)
    runs = [run, dataclasses.replace(trial, trial=True)]

    class Broken(Unsteady):
        def poll(self, wait_s: float) -> list[Ending]:
            return [dataclasses.replace(end, state="failed") for end in super().poll(wait_s)]

    executor = Broken({"seed_0": ["silent"], "seed_1": ["silent"]}, 2)
    assert run_all(runs, executor, show=lambda _: None)
    assert [state(run) for run in runs] == ["failed", "interrupted"]
    assert "silent" in str(trial.folder.read_status()["reason"])


class Taker(Silent):
    """Gives the run to another worker after its first step."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def update(self, step: int, numbers: dict[str, Any]) -> None:
        if step == 1 and self.folder.read_status().get("attempt") == 1:
            self.folder.take()


def test_a_worker_whose_run_was_given_to_another_writes_nothing_more(tmp_path: Path) -> None:
    [run] = planned(tmp_path, 1)
    run = dataclasses.replace(run, attempt=run.folder.take())
    with pytest.raises(Outdated, match=r"attempt 2, this is 1"):
        train(run.config, progress=Taker(RunFolder(run.folder.path)), attempt=run.attempt)
    status = run.folder.read_status()
    assert (status["attempt"], status["pid"]) == (2, None)
    assert not run.folder.summary.exists()
    assert not any(run.folder.checkpoints.glob("step_*"))
    before = {path: path.stat().st_mtime_ns for path in run.folder.path.rglob("*")}
    work(run)
    assert {path: path.stat().st_mtime_ns for path in run.folder.path.rglob("*")} == before
    work(dataclasses.replace(run, attempt=2))
    assert state(run) == "finished"


@pytest.mark.parametrize(("silent_s", "expected"), [(1, "running"), (120, "interrupted")])
def test_a_run_on_another_host_is_judged_by_its_heartbeat_alone(silent_s: float, expected: str) -> None:
    gone = 2**22 + os.getpid()  # no process here
    status = {"state": "running", "pid": gone, "heartbeat": time.time() - silent_s}
    assert state_of(status | {"host": "elsewhere"}) == expected
    assert state_of(status | {"host": socket.gethostname()}) == "interrupted"


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.study.host.SEEN_S", 0.0)
    [run] = planned(tmp_path, 1)
    run = dataclasses.replace(run, attempt=1)
    ended, reason, _ = host(parcel(run), str(tmp_path), 1, 0)
    assert ended == "failed"
    assert "put the study on storage that all nodes share" in reason


@pytest.mark.parametrize(("name", "extra"), [("ray", "cluster"), ("slurm", "slurm")])
def test_a_missing_package_names_its_extra(
    name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(module: str, *rest: Any, **more: Any) -> Any:
        if module == f"headwise.study.{name}":
            raise ImportError("none", name="package")
        return real(module, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(HeadwiseError, match=rf"pip install 'headwise\[{extra}\]'"):
        executor_named(name, Resources(), tmp_path)


@pytest.mark.parametrize(
    ("where", "values", "message"),
    [
        (Where("moon"), {}, "choose from local, ray, slurm"),
        (Where("ray", cpus=0), {}, "--cpus-per-run"),
        (Where("ray", gpus=2), {"device": "cpu"}, "contradicts"),
        (Where("ray", gpus=2), {"fit_batch": True}, "several GPUs cannot halve its batch"),
        (Where("slurm"), {"max_length_at": "1GiB"}, "measures this machine"),
        (Where("slurm"), {"device": "cuda:1"}, "names one GPU of one machine"),
        (Where("ray", gpus=0), {"device": "cuda"}, "contradicts"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    where: Where, values: dict[str, Any], message: str
) -> None:
    study = Study("demo", variants={"flash": Variant()}, **values)
    with pytest.raises(HeadwiseError, match=message):
        where.check(study, Path("runs"))


def test_a_url_is_no_folder_of_runs() -> None:
    with pytest.raises(HeadwiseError, match="give a folder that all machines mount"):
        Where("ray").check(Study("demo", variants={"flash": Variant()}), Path("s3://bucket/runs"))


@pytest.mark.parametrize(("name", "option"), [("local", {"address": "x:1"}), ("ray", {"slurm": ["a=b"]})])
def test_an_option_of_another_executor_is_refused(name: str, option: Any, tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match=r"is an option of --executor"):
        executor_named(name, Resources(), tmp_path, **option)


def test_places_that_differ_in_numbers_have_the_configurations_that_the_parser_gives() -> None:
    axes = {
        "model.attention.tt.rank": [2, 4],
        "training.lr": [1e-3, 1],
        "training.compile": [False, True],
    }
    kinds = {"flash": Variant(), "tt": Variant(overrides={"model.attention.kind": "tt"})}
    study = Study("demo", base={"training.max_steps": 3}, variants=kinds, axes=axes, device="cpu")
    study.validate()
    for place in places(study):
        values = {"training.max_steps": 3, "device": "cpu"} | place.overrides
        assert configure(study, place) == from_dict(values)


def test_a_status_with_an_attempt_that_is_no_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": "planned", "attempt": "many"}))
    with pytest.raises(HeadwiseError, match="attempt"):
        RunFolder(tmp_path).take()
