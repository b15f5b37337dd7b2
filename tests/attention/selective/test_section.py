"""The memory that selection leaves, in the report: only where a run has one, as a share of visible keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwise import report
from headwise.questions.sections import sections


def build(folder: Path) -> dict[str, Path]:
    return report.build(folder, sections=sections())


def test_memory_per_layer_and_both_loss_terms(tmp_path: Path, make) -> None:
    variants = {
        "flash": make.Variant("flash"),
        "plain": make.Variant("selective", memory=(6.45, 32.25)),
        "paid": make.Variant("selective", memory=(64.5, 64.5), penalty=0.01),
    }
    paths = report.build(
        make.study(tmp_path / "s", variants, seeds=(0, 1), shape=make.SMALL), sections=sections()
    )
    found = {entry["variant"]: entry for entry in json.loads(paths["json"].read_text())["selection"]}
    assert list(found) == ["plain", "paid"]
    plain, paid = found.values()
    assert [layer["mean"] for layer in plain["last"]] == pytest.approx([0.1, 0.5])  # T = 128
    assert plain["all"]["mean"] == pytest.approx(0.3)
    assert [line["seed"] for line in plain["lines"]] == [0, 1]
    for line in plain["lines"]:
        assert line["steps"] == [10, 20, 30, 40, 50, 60]
        assert line["kept"][2] == pytest.approx([0.55, 0.75])
    assert plain["terms"] is None
    assert set(paid["terms"]["penalty"]["mean"]) == {0.01}
    assert paid["terms"]["loss"]["steps"] == paid["terms"]["penalty"]["steps"]
    assert (paths["figures"] / "kept_context.png").is_file()
    assert (
        "| plain | 2 | 30.0% ± 0.0% | 10.0% (10.0% – 10.0%) | 50.0% (50.0% – 50.0%) |"
        in paths["markdown"].read_text()
    )
    assert 'id="selection-plots"' in paths["html"].read_text()


def test_without_selection_there_is_no_section(built: dict[str, Path]) -> None:
    assert json.loads(built["json"].read_text())["selection"] == []
    assert not (built["figures"] / "kept_context.png").exists()
    assert "Context kept" not in built["markdown"].read_text()
    assert "selection-plots" not in built["html"].read_text()


def test_a_run_that_is_cut_off_has_its_length_from_its_configuration(tmp_path: Path, make) -> None:
    variant = make.Variant("selective", memory=(6.45, 32.25), states={0: ("interrupted", "stopped")})
    folder = make.run(tmp_path / "run", variant, 0, make.SMALL)
    config = folder / "config.yaml"
    assert json.loads(build(folder)["json"].read_text())["selection"] == []  # no length known
    config.write_text("data: {seq_len: 128}\n" + config.read_text())
    (entry,) = json.loads(build(folder)["json"].read_text())["selection"]
    assert not entry["averaged"]
    assert len(entry["last"]) == 2
