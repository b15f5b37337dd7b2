"""`headwise.report.build` writes whole reports for whatever lies in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from headwise import report
from headwise.cli.report import main
from headwise.errors import HeadwiseError
from headwise.report.figures import colour_range

PNG = b"\x89PNG\r\n\x1a\n"


def test_writes_four_things_and_draws_every_measure(built: dict[str, Path]) -> None:
    assert {name: path.name for name, path in built.items()} == {
        "markdown": "report.md", "html": "report.html", "json": "report.json", "figures": "figures",
        "sweep": "sweep_results.csv", "all": "all_results.parquet",
        "entropy_log.csv": "entropy_log.csv",
    }  # fmt: skip
    names = {path.name for path in built["figures"].iterdir()}
    assert {"loss.png", "comparison.png", "costs.png", "atlas_entropy.png", "atlas_margin.png"} <= names
    assert all(path.read_bytes().startswith(PNG) for path in built["figures"].iterdir())


def test_markdown_shows_every_figure_that_was_drawn(built: dict[str, Path]) -> None:
    text = built["markdown"].read_text()
    assert all(f"](figures/{path.name})" in text for path in built["figures"].iterdir())


def test_building_again_replaces_the_report(tmp_path: Path, make) -> None:
    folder = make.study(tmp_path / "s", {"flash": make.Variant("flash")}, seeds=(0,), shape=make.SMALL)
    first = report.build(folder)
    (first["figures"] / "stale.png").write_bytes(b"")
    make.study_yaml(folder, title="Another title")
    second = report.build(folder)
    assert not (second["figures"] / "stale.png").exists()
    assert second["markdown"].read_text().startswith("# Another title\n")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_another_baseline_and_folder_leave_the_studys_own_report(tmp_path: Path, make) -> None:
    variants = {name: make.Variant("flash") for name in ("flash", "mha")}
    folder = make.study(tmp_path / "s", variants, seeds=(0, 1), shape=make.SMALL)
    own = report.build(folder)["json"].read_bytes()
    other = report.build(folder, baseline="mha", out=tmp_path / "reports" / "other")
    rows = json.loads(other["json"].read_text())["comparisons"]
    assert {(row["variant"], row["baseline"]) for row in rows} == {("flash", "mha")}
    assert (folder / "report.json").read_bytes() == own
    with pytest.raises(HeadwiseError, match="variant 'mhaa' is not known"):
        report.build(folder, baseline="mhaa")
    with pytest.raises(HeadwiseError, match="is a file"):
        report.build(folder, out=other["json"])


def test_a_single_run(tmp_path: Path, make) -> None:
    paths = report.build(make.run(tmp_path / "copy", make.Variant("mha"), 0, make.SMALL))
    data = json.loads(paths["json"].read_text())
    assert [(v["name"], v["n"]) for v in data["variants"]] == [("copy", 1)]
    assert [flag["code"] for flag in data["flags"]] == ["one_seed"]
    assert data["verdicts"] == []


def test_a_folder_of_loose_runs(tmp_path: Path, make) -> None:
    for name, kind in (("first", "flash"), ("second", "mha")):
        make.run(tmp_path / name, make.Variant(kind), 0, make.SMALL)
    data = json.loads(report.build(tmp_path)["json"].read_text())
    assert [v["name"] for v in data["variants"]] == ["first", "second"]
    assert data["baseline"] == "first"
    assert data["verdicts"][0]["verdict"] == "INCONCLUSIVE"  # one seed has no interval


@pytest.mark.parametrize("state", ["failed", "skipped"])
def test_a_study_without_one_usable_run(tmp_path: Path, make, state: str) -> None:
    variants = {
        name: make.Variant(name, states={0: (state, "a reason"), 1: (state, "a reason")})
        for name in ("flash", "mha")
    }
    folder = make.study(tmp_path / "s", variants, seeds=(0, 1), shape=make.SMALL)
    data = json.loads(report.build(folder)["json"].read_text())
    assert all(v["n"] == 0 for v in data["variants"])
    assert any("a reason" in flag["text"] for flag in data["flags"])
    assert data["verdicts"][0]["verdict"] == "INCONCLUSIVE"


def test_planned_runs_without_folders(tmp_path: Path, make) -> None:
    folder = make.study(tmp_path / "s", {"flash": make.Variant("flash")}, seeds=(0,), shape=make.SMALL)
    make.study_yaml(folder, seeds=[0, 1])
    data = json.loads(report.build(folder)["json"].read_text())
    assert [run["state"] for run in data["runs"]] == ["finished", "planned"]


def test_runs_without_heads_or_maps(tmp_path: Path, make) -> None:
    bare = make.Variant("flash", heads=False, maps=False)
    paths = report.build(make.study(tmp_path / "s", {"flash": bare}, seeds=(0, 1), shape=make.SMALL))
    assert "No averaged run of this variant has measured heads." in paths["markdown"].read_text()
    assert 'id="atlas"' not in paths["html"].read_text()


def test_damaged_files_are_flagged_and_the_rest_is_reported(tmp_path: Path, make) -> None:
    folder = make.study(tmp_path / "s", {"flash": make.Variant("flash")}, seeds=(0, 1, 2), shape=make.SMALL)
    (folder / "flash/seed_0/summary.json").write_text("{")
    (folder / "flash/seed_1/heads/step_00000010.parquet").write_bytes(b"cut off")
    (folder / "flash/seed_2/maps/step_00000020.npz").write_bytes(b"cut off")
    data = json.loads(report.build(folder)["json"].read_text())
    assert [run["state"] for run in data["runs"]] == ["failed", "finished", "finished"]
    texts = [flag["text"] for flag in data["flags"]]
    assert any("unreadable summary.json" in text for text in texts)
    assert any("unreadable heads" in text for text in texts)
    assert data["variants"][0]["n"] == 2


def test_the_verb_prints_where_the_report_is(
    tmp_path: Path, make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make.study(tmp_path / "s", {"flash": make.Variant("flash")}, seeds=(0,), shape=make.SMALL)
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No conclusion: flash is the only variant here")
    assert str(folder / "report.html") in printed


def test_the_verb_refuses_what_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match="no runs below"):
        main([str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_heads_that_hardly_differ_get_one_colour() -> None:
    low, high = colour_range(np.array([3.205, 3.206, np.nan]))
    assert (3.206 - 3.205) / (high - low) < 0.02
    assert colour_range(np.array([1.0, 3.0])) == (1.0, 3.0)
