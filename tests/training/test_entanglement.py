"""Entanglement over training: when it is measured, what is written, and what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.config.run import from_dict
from headwise.errors import HeadwiseError
from headwise.runs.read import Run
from headwise.training.run import train

ON = {"measure.entanglement.enabled": True, "measure.entanglement.window": 8, "measure.maps": 0}


def run_with(tiny_config, folder: Path, **overrides: object) -> tuple[Run, dict]:
    summary = train(tiny_config(**ON, out=str(folder), **overrides))
    return Run(folder), summary


def test_it_is_off_by_default(tiny_config, tmp_path: Path) -> None:
    summary = train(tiny_config(out=str(tmp_path / "run"), **{"measure.maps": 0}))
    assert "entanglement" not in summary
    assert Run(tmp_path / "run").entanglement is None


def test_every_second_evaluation_and_the_last(tiny_config, tmp_path: Path) -> None:
    every = {"training.eval_every": 1, "training.max_steps": 5, "measure.entanglement.every": 2}
    run, summary = run_with(tiny_config, tmp_path / "run", **every)
    table = run.entanglement
    assert sorted(table["step"].unique().to_list()) == [0, 2, 4, 5]
    assert table.height == 4 * 2 * 2
    assert (
        table.select("entanglement", "regional_entanglement", "sparsity").null_count().sum_horizontal().item()
        == 0
    )
    cost = summary["entanglement"]
    assert (cost["window"], cost["every"], cost["evaluations"]) == (8, 2, 4)
    assert 0 < cost["seconds"] <= summary["measure_s"]
    assert cost["share"] > 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "4 measurements, one at 1 in 2 evaluations" in log
    assert "s each, " in log
    assert run.summary["entanglement"] == cost


def test_the_loss_is_that_of_a_run_without(tiny_config, tmp_path: Path) -> None:
    plain = train(tiny_config(out=str(tmp_path / "plain"), **{"measure.maps": 0}))
    _, measured = run_with(tiny_config, tmp_path / "measured")
    assert plain["val_loss"] == measured["val_loss"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("window", 1, "must be at least 2"),
        ("window", 17, "data.seq_len is 16"),
        ("n_windows", 0, "must be at least 1"),
        ("n_regions", 9, "must be at most 8: a region has at least one query"),
        ("every", 0, "must be at least 1"),
    ],
)
def test_bad_values_are_refused(tiny_config, key: str, value: int, said: str) -> None:
    with pytest.raises(HeadwiseError, match=f"measure.entanglement.{key if key != 'x' else ''}.*{said}"):
        tiny_config(**ON | {f"measure.entanglement.{key}": value})


def test_values_are_refused_where_it_is_off() -> None:
    with pytest.raises(HeadwiseError, match=r"measure\.entanglement\.every"):
        from_dict({"training.max_steps": 1, "measure.entanglement.every": 0})
