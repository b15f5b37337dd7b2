"""Searches: trials, the winner on fresh seeds, what resumes, what counts as worst, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise import report
from headwise.cli.main import main
from headwise.config.run import Config, to_yaml
from headwise.errors import HeadwiseError
from headwise.questions.sections import sections
from headwise.report.collect import collect
from headwise.runs.read import Study as Planned
from headwise.study.executor import _settled
from headwise.study.plan import PlannedRun, plan, still_to_come, waiting, write_plan
from headwise.study.read import override, read_study
from headwise.study.search import _drawn, propose
from headwise.study.space import Search
from headwise.study.study import Study, Variant

KIND = "model.attention.kind"
LR = "training.lr"
BASE = {
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "data": {"name": "copy", "seq_len": 16, "batch_size": 2, "eval_sequences": 4},
    "training": {"max_steps": 2, "eval_every": 0, "checkpoint_every": 0, "lr": 1e-3},
    "measure": {"heads": False, "maps": 0},
}
GRID = {"keys": {LR: [1e-3, 1e-2, 1e-1]}}
TPE = {"keys": {LR: {"low": 1e-4, "high": 1.0, "log": True}}, "sampler": "tpe", "trials": 10}


def searched(search: dict[str, Any], **values: Any) -> Study:
    variants = {"a": Variant(overrides={KIND: "flash"}), "b": Variant(overrides={KIND: "mha"})}
    given_ = {"name": "s", "base": BASE, "variants": variants, "device": "cpu", "search": Search(**search)}
    made = Study(**given_ | values)
    made.validate()
    return made


def bowl(config: Config) -> float | str:
    """Best at 0.02 for `flash` and at 0.2 for `mha`; a seed adds a little."""
    best = 0.02 if config.model.attention.kind == "flash" else 0.2
    return 2 + abs(config.training.lr - best) + 0.001 * (config.seed % 7)


def end(runs: list[PlannedRun], loss: Callable[[Config], float | str]) -> None:
    """End every run that has not ended: with a loss, or in the state that `loss` names."""
    for run in runs:
        if run.folder.holds_run():
            continue
        run.folder.start(to_yaml(run.config))
        found = loss(run.config)
        state = found if isinstance(found, str) else "finished"
        run.folder.write_status(state, step=2, reason="" if state == "finished" else "on purpose")
        about = {"state": state, "step": 2, "data_checksum": "d", "kind": run.config.model.attention.kind}
        run.folder.write_summary(about | {"val_loss": found if state == "finished" else None})


def carried(study: Study, root: Path, loss: Callable[[Config], float | str] = bowl) -> list[PlannedRun]:
    """Run a study to its end, as the command does."""
    runs = plan(study, root)
    while True:
        end(runs, loss)
        more = plan(study, root, runs)
        write_plan(study, more, root)
        if len(more) == len(runs):
            return more
        runs = more


def by_name(runs: list[PlannedRun]) -> dict[str, Any]:
    return {f"{run.variant}/{run.config.seed}": run.config.training.lr for run in runs}


def reported(study: Study, root: Path) -> dict[str, Any]:
    """What the report says, without drawing it."""
    return collect(Planned.read(root / study.name), sections())


def test_trials_come_first_and_only_the_winner_on_fresh_seeds_is_compared(tmp_path: Path) -> None:
    study = searched(GRID | {"confirm_seeds": [7, 8]})
    first = plan(study, tmp_path)
    assert by_name(first) == {
        f"{v}@trial=00{n}/0": lr for v in "ab" for n, lr in enumerate([1e-3, 1e-2, 1e-1])
    }
    assert all(run.trial for run in first)
    assert still_to_come(study, tmp_path) == 8
    assert waiting(study, tmp_path)["a"] == "waits for its search: 0 of 3 trials have ended"
    runs = carried(study, tmp_path)
    found = by_name(runs)
    assert {name: found[name] for name in ("a/7", "a/8", "b/7", "b/8")} == {
        "a/7": 1e-2, "a/8": 1e-2, "b/7": 1e-1, "b/8": 1e-1,
    }  # fmt: skip
    assert found["a@trial=default/7"] == found["b@trial=default/8"] == 1e-3
    planned = Planned.read(tmp_path / "s")
    assert {(run.variant, run.seed) for run in planned.runs} == {("a", 7), ("a", 8), ("b", 7), ("b", 8)}
    assert len(planned.trials) == 6 + 4
    data = reported(study, tmp_path)
    [row] = data["conclusions"]
    assert row["seeds"] == [7, 8]


def test_the_report_shows_both_values_of_a_winner_and_what_speaks_for_it(tmp_path: Path) -> None:
    study = searched(GRID)
    carried(study, tmp_path, lambda config: bowl(config) + (0.05 if config.seed >= 100 else 0))
    paths = report.build(tmp_path / "s", sections=sections())
    data = json.loads(paths["json"].read_text())
    a, b = data["search"]["variants"]
    assert (a["winner"], b["winner"]) == (1, 2)
    assert a["trials"][1]["value"] == pytest.approx(2.01)
    assert a["confirmed"]["mean"] == pytest.approx(2.01 + 0.05 + 0.001 * (2 + 3 + 4) / 3)
    assert a["gain"]["mean"] == pytest.approx(-0.009)
    assert (a["ends"], b["ends"]) == ({}, {LR: "above"})
    texts = {flag["code"]: flag["text"] for flag in data["flags"]}
    assert texts["search_end"].endswith("No trial lies above training.lr=0.1, so the best may lie beyond: "
                                        "widen the range.")  # fmt: skip
    assert any("better than the configuration without a search" in text for text in a["text"])
    assert a["runner_up"]["trial"] == 0
    assert a["noise"] == pytest.approx(4.302653 * 0.001 * 2**0.5, rel=1e-4)
    assert a["doubt"] is None
    rows = (tmp_path / "s" / "sweep_results.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 + 12
    assert all((tmp_path / "s" / name).is_file() for name in ("report.html", "figures/search.png"))
    assert "## Search" in (tmp_path / "s" / "report.md").read_text()


def test_a_winner_that_seeds_may_have_chosen_is_flagged(tmp_path: Path) -> None:
    noisy = {0: 0.0, 100: 0.0, 101: 0.5, 102: 1.0}
    study = searched(GRID)
    carried(study, tmp_path, lambda config: 2 + 0.01 * config.training.lr + noisy[config.seed])
    data = reported(study, tmp_path)
    assert data["search"]["variants"][0]["close"] == [1, 2]
    assert "choice_in_noise" in {flag["code"] for flag in data["flags"]}


def test_several_seeds_of_a_trial_are_compared_in_pairs(tmp_path: Path) -> None:
    study = searched(GRID | {"seeds": [0, 1, 2]})
    carried(study, tmp_path, lambda config: bowl(config) + 3.0 * (config.seed % 3))
    a = reported(study, tmp_path)["search"]["variants"][0]
    assert (a["doubt"], a["trials"][0]["n"]) == (None, 3)


def test_tpe_resumes_to_the_same_proposals(tmp_path: Path) -> None:
    study = searched(TPE)
    whole = by_name(carried(study, tmp_path / "whole"))
    assert sum(name.startswith("a@trial=0") for name in whole) == 10
    assert len({lr for name, lr in whole.items() if name.startswith("a@trial=0")}) == 10
    runs = plan(study, tmp_path / "cut")
    assert len(runs) == 8, "a batch of four for each variant"
    end(runs[:3], bowl)
    _drawn.cache_clear()
    assert by_name(plan(study, tmp_path / "cut")) == by_name(runs)
    assert by_name(carried(study, tmp_path / "cut")) == whole


def test_what_a_trial_came_to_decides_the_next_proposals() -> None:
    search = Search(**TPE)
    space = search.space()
    known = [({LR: round(10.0 ** -(n / 4), 4)}, float(n)) for n in range(12)]
    worse = [(values, None if n < 3 else value) for n, (values, value) in enumerate(known)]
    assert propose(search, space, known[:-4]) == propose(search, space, known[:-4])
    search.trials = 20
    assert propose(search, space, known) != propose(search, space, worse)


@settings(max_examples=25)
@given(
    low=st.integers(1, 50), steps=st.integers(1, 30), step=st.integers(1, 9), seed=st.integers(0, 9),
    sampler=st.sampled_from(["random", "tpe"]), share=st.floats(0.1, 1.0),
)  # fmt: skip
def test_proposals_lie_in_the_space_and_none_comes_twice(
    low: int, steps: int, step: int, seed: int, sampler: str, share: float
) -> None:
    keys = {
        "model.d_ff": {"low": low, "high": low + steps * step, "step": step},
        "training.schedule": ["wsd", "cosine"],
    }
    trials = max(1, round(share * 2 * (steps + 1)))
    search = Search(keys, sampler, min(trials, 20), seed=seed)
    search.validate()
    found: list[tuple[dict[str, Any], float | None]] = []
    while batch := propose(search, search.space(), found):
        found += [(values, values["model.d_ff"] / 7) for values in batch]
    assert len(found) == search.trials
    assert len({str(values) for values, _ in found}) == len(found)
    allowed = range(low, low + steps * step + 1, step)
    assert all(type(v["model.d_ff"]) is int and v["model.d_ff"] in allowed for v, _ in found)


@pytest.mark.parametrize("state", ["diverged", "failed", "out_of_memory"])
def test_a_trial_that_breaks_counts_as_worst_and_is_not_run_again(state: str, tmp_path: Path) -> None:
    def loss(config: Config) -> float | str:
        return state if config.training.lr == 1e-2 else bowl(config)

    study = searched(GRID)
    runs = carried(study, tmp_path, loss)
    assert by_name(runs)["a/100"] == 1e-3
    assert all(_settled(run) for run in runs)
    a = reported(study, tmp_path)["search"]["variants"][0]
    assert (a["trials"][1]["value"], a["trials"][1]["outcome"]) == (None, f"{state}: on purpose")
    assert "1 of them without a value" in a["text"][0]
    assert a["default"] is None, "the winner is the configuration as it is"


def test_a_search_of_which_all_trials_failed_says_so(tmp_path: Path) -> None:
    study = searched(GRID)
    carried(study, tmp_path, lambda c: "diverged" if c.model.attention.kind == "mha" else bowl(c))
    reason = "has no winner: none of its 3 trials has a value (diverged: on purpose)"
    assert waiting(study, tmp_path) == {"b": reason}
    data = reported(study, tmp_path)
    assert f"b {reason}." in [flag["text"] for flag in data["flags"] if flag["code"] == "search_failed"]
    assert {run["state"] for run in data["runs"] if run["variant"] == "b"} == {"planned"}


def test_one_setting_for_the_whole_study(tmp_path: Path) -> None:
    found = by_name(carried(searched(GRID | {"each": "study"}), tmp_path))
    assert found["a/100"] == found["b/100"] == 1e-1 or found["a/100"] == found["b/100"] == 1e-2
    assert found["a@trial=001/0"] == found["b@trial=001/0"]


def test_an_option_of_one_kind_is_searched_where_that_kind_runs(tmp_path: Path) -> None:
    variants = {"plain": Variant(), "tt": Variant(overrides={KIND: "tt"})}
    study = searched({"keys": {"model.attention.tt.rank": [1, 2, 4]}}, variants=variants)
    runs = carried(study, tmp_path, lambda config: 2.0 + (config.model.attention.tt.rank or 8))
    assert {run.variant for run in runs if run.trial} == {f"tt@trial=00{n}" for n in range(3)} | {
        "tt@trial=default"
    }
    assert {run.config.seed for run in runs if run.variant == "plain"} == {100, 101, 102}
    assert "it runs unchanged" in reported(study, tmp_path)["search"]["variants"][0]["text"][0]


def test_a_combination_that_cannot_be_counts_as_worst_and_a_search_of_none_is_refused(tmp_path: Path) -> None:
    study = searched({"keys": {"model.n_heads": [2, 3], LR: [1e-3, 1e-2]}})
    assert {run.config.model.n_heads for run in plan(study, tmp_path)} == {2}
    carried(study, tmp_path)
    trials = reported(study, tmp_path)["search"]["variants"][0]["trials"]
    assert [trial["outcome"].startswith("cannot run") for trial in trials] == [False, False, True, True]
    with pytest.raises(HeadwiseError, match="no trial of the search of a can run"):
        plan(searched({"keys": {"model.n_heads": [3, 5]}}), tmp_path / "none")


RANGE = {"low": 1e-4, "high": 1e-2}


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"keys": {}}, "search.keys is empty"),
        ({"keys": {"training.lrr": [1, 2]}}, "did you mean 'training.lr'"),
        ({"keys": {LR: {"low": 1.0, "high": 1.0}}}, "low must be less than high"),
        ({"keys": {LR: {"low": 0, "high": 1, "log": True}}}, "must begin above 0"),
        ({"keys": {LR: {"low": "x", "high": 1}}}, "give a number"),
        ({"keys": {LR: {"low": 1}}}, "has no high"),
        ({"keys": {LR: RANGE | {"lg": True}}}, "did you mean 'log'"),
        ({"keys": {LR: RANGE | {"step": 2}}}, "step applies only to whole numbers"),
        ({"keys": {LR: RANGE}}, "needs one of them"),
        ({"keys": {LR: RANGE | {"points": 1}}}, "must be at least 2"),
        ({"keys": {"model.d_ff": {"low": 1.5, "high": 8}}}, "give a whole number"),
        ({"keys": {"model.d_ff": {"low": 8, "high": 33, "step": 8}}}, "do not reach"),
        ({"keys": {"training.schedule": {"low": 1, "high": 2}}}, "it has no range"),
        ({"keys": {LR: [1e-3]}}, "two values or more"),
        ({"keys": {LR: [1e-3, 1e-3]}}, "a value twice"),
        ({"keys": {"seed": [1, 2]}}, "is luck"),
        ({"keys": {KIND: ["flash", "mha"]}}, "make each a variant"),
        ({"keys": {"data.seq_len": [8, 16]}}, "the data on which the loss is measured"),
        (GRID | {"sampler": "tpa"}, "did you mean 'tpe'"),
        (GRID | {"by": "loss"}, "search.by 'loss' is not known"),
        (GRID | {"trials": 0}, "at least 1"),
        (GRID | {"trials": 2}, "has 3 combinations"),
        (GRID | {"confirm_seeds": [0, 1]}, "no trial has used"),
        (GRID | {"seeds": []}, "different seeds"),
        (GRID | {"sampler": "random"}, "search.trials is not given"),
        (GRID | {"sampler": "random", "trials": 4}, "only 3 combinations"),
        (TPE | {"trials": 6000}, "at most 10,000"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        searched(search)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"axes": {LR: [1, 2]}}, "is an axis, too"),
        ({"variants": {"a": Variant(overrides={LR: 1.0})}}, "is set by variant 'a'"),
        (
            {"search": {"keys": {"training.max_steps": [1, 2]}}, "budget": {"kind": "steps", "value": 9}},
            "the budget",
        ),
        ({"search": {"keys": {"model.d_ff": [8, 16]}}, "match_parameters": True}, "leave one out"),
    ],
)
def test_what_contradicts_a_search_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        searched(**{"search": GRID} | values)


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.study.space.find_spec", lambda name: None)
    with pytest.raises(HeadwiseError, match=r"pip install 'headwise\[search\]'"):
        searched(TPE)
    searched(GRID)


def test_a_file_and_a_command_line_set_a_search(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    values = {"base": BASE, "variants": {"a": None}, "search": GRID}
    file.write_text(yaml.safe_dump(values))
    study = read_study(file)
    override(study, "search.trials", "5")
    override(study, f"search.keys.{LR}", "{low: 1e-4, high: 1, log: true}")
    study.validate()
    assert [run.config.training.lr for run in plan(study, tmp_path)] == [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    for key, message in [
        ("search.trails", "did you mean 'trials'"),
        ("search.keys.training.lrr", "did you mean"),
    ]:
        with pytest.raises(HeadwiseError, match=message):
            override(study, key, "3")
    with pytest.raises(HeadwiseError, match="expected"):
        override(study, "search.trials", "many")
    assert main(["study", str(file), "--seed=3", "--plan"]) == 2
    file.write_text(yaml.safe_dump(values | {"seeds": [1]}))
    with pytest.raises(HeadwiseError, match="seeds that would change nothing"):
        read_study(file)


def test_a_searched_study_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "real.yaml"
    search = {"keys": {LR: [1e-3, 1e-2]}, "confirm_seeds": [1], "default": False}
    file.write_text(
        yaml.safe_dump({"base": BASE, "variants": {"a": None}, "search": search, "device": "cpu"})
    )
    command = ["study", str(file), f"--out={tmp_path}"]
    assert main([*command, "--plan"]) == 0
    assert "2 runs are planned; at most 1 more depend" in capsys.readouterr().out
    assert main(command) == 0
    planned = Planned.read(tmp_path / "real")
    assert [run.state for run in planned.runs + planned.trials] == ["finished"] * 3
