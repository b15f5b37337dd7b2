"""Stages: a variant that waits for others, takes what the best changes, and says which and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headwise.config.run import to_yaml
from headwise.errors import HeadwiseError
from headwise.report.collect import collect
from headwise.runs.read import Study as Planned
from headwise.study.plan import PlannedRun, plan, waiting, write_plan
from headwise.study.study import BestOf, Study, Variant

KIND = "model.attention.kind"
BASE = {
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "data": {"name": "copy", "seq_len": 16, "batch_size": 2, "eval_sequences": 4},
    "training": {"max_steps": 2, "eval_every": 0, "checkpoint_every": 0},
}


def staged(stage: BestOf | None = None, **values: Any) -> Study:
    variants = {
        "a": Variant(overrides={KIND: "flash", "model.n_layers": 1, "data.seq_len": 32}),
        "b": Variant(overrides={KIND: "mha", "model.n_layers": 2, "data.seq_len": 32}),
        "best": Variant("the best", overrides={"data.name": "repeat"}, best_of=stage or BestOf(["a", "b"])),
    }
    made = Study(
        **{"name": "s", "base": BASE, "variants": variants, "seeds": [0, 1], "device": "cpu"} | values
    )
    made.validate()
    return made


def ended(runs: list[PlannedRun], losses: dict[str, list[float | None]], state: str = "finished") -> None:
    """End the runs of the named variants with these losses, seed by seed."""
    for run in runs:
        if run.variant in losses:
            run.folder.start(to_yaml(run.config))
            loss = losses[run.variant][run.config.seed]
            run.folder.write_status("diverged" if loss is None else state, step=2)
            run.folder.write_summary({"state": state, "step": 2, "val_loss": loss, "tokens_per_sec": loss})


def test_a_stage_waits_until_every_run_has_ended(tmp_path: Path) -> None:
    made = staged()
    runs = plan(made, tmp_path)
    assert {run.variant for run in runs} == {"a", "b"}
    ended(runs, {"a": [2.0, 2.2]})
    assert waiting(made, tmp_path) == {"best": "waits for a, b"}
    assert {run.variant for run in plan(made, tmp_path)} == {"a", "b"}
    planned = Planned.read(write_plan(made, runs, tmp_path))
    assert [(run.state, run.reason) for run in planned.runs if run.variant == "best"] == [
        ("planned", "waits for a, b")
    ] * 2


@pytest.mark.parametrize(("by", "best"), [("val_loss", "b"), ("tokens_per_sec", "a")])
def test_it_takes_the_model_of_the_best_and_keeps_its_own_data(by: str, best: str, tmp_path: Path) -> None:
    made = staged(BestOf(["a", "b"], by=by))
    runs = plan(made, tmp_path)
    ended(runs, {"a": [2.0, 2.2], "b": [2.3, 1.5]})
    [first, second] = [run for run in plan(made, tmp_path) if run.variant == "best"]
    assert (first.config.seed, second.config.seed) == (0, 1)
    assert first.config.model.attention.kind == made.variants[best].overrides[KIND]
    assert first.config.model.n_layers == made.variants[best].overrides["model.n_layers"]
    assert (first.config.data.name, first.config.data.seq_len) == ("repeat", 16)
    written = Planned.read(write_plan(made, plan(made, tmp_path), tmp_path)).variants["best"]["chosen"]
    assert written["best"] == best
    assert written["values"] == pytest.approx({"a": 2.1, "b": 1.9})
    end = "lowest" if by == "val_loss" else "highest"
    assert written["text"].startswith(
        f"{best} has the {end} {by} of a 2.1, b 1.9; the choice is within the noise"
    )


def test_a_choice_within_the_noise_of_seeds_says_so_and_is_flagged(tmp_path: Path) -> None:
    def flags(losses: dict[str, list[float | None]], root: Path) -> tuple[str, list[str]]:
        made = staged()
        ended(plan(made, root), losses)
        write_plan(made, plan(made, root), root)
        data = collect(Planned.read(root / "s"))
        return data["chosen"][0]["text"], [f["text"] for f in data["flags"] if f["code"] == "choice_in_noise"]

    text, found = flags({"a": [2.0, 2.2], "b": [2.3, 1.5]}, tmp_path / "noise")
    assert "b is not separated from a (difference +0.2 [-6.153, +6.553], 2 seeds)" in text
    assert found == [
        "best takes the best of others by val_loss, and the choice is within the noise of seeds: b is not "
        "separated from a (difference +0.2 [-6.153, +6.553], 2 seeds)."
    ]
    text, found = flags({"a": [2.0, 2.2], "b": [1.5, 1.701]}, tmp_path / "clear")
    assert ("noise" in text, found) == (False, [])


def test_a_variant_that_diverged_is_not_the_best_and_none_may_be(tmp_path: Path) -> None:
    made = staged()
    runs = plan(made, tmp_path)
    ended(runs, {"a": [2.0, 2.2], "b": [None, None]})
    [run, _] = [run for run in plan(made, tmp_path) if run.variant == "best"]
    assert run.config.model.attention.kind == "flash"
    other = tmp_path / "other"
    ended(plan(made, other), {"a": [None, None], "b": [None, None]})
    assert {run.variant for run in plan(made, other)} == {"a", "b"}
    assert "none is the best of them" in waiting(made, other)["best"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stage": BestOf(["a"])}, "two different variants or more"),
        ({"stage": BestOf(["a", "c"])}, "'c' is not known"),
        ({"stage": BestOf(["a", "best"])}, "waits for others itself"),
        ({"stage": BestOf(["a", "b"], by="speed")}, "'speed' is not known"),
        ({"axes": {"data.seq_len": [8, 16]}}, "leave axes out"),
        ({"baseline": "best"}, "is no baseline"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        staged(**wrong)
