"""Reports of any runs: their tables as files, the best run, several folders, other data, PDF, appendix."""

from __future__ import annotations

import csv
import json
import os
import stat
from pathlib import Path

import polars as pl
import pytest
import yaml

from headwise import report
from headwise.cli.report import main
from headwise.errors import HeadwiseError
from headwise.report import pdf
from headwise.report.exports import ALL, SWEEP
from headwise.report.pdf import write_pdf
from headwise.runs.folder import RunFolder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_sweep_table_has_a_row_a_run_and_the_columns_of_the_source(built: dict[str, Path]) -> None:
    rows = rows_of(built["sweep"])
    assert list(rows[0]) == list(SWEEP)
    assert SWEEP[:16] == (
        "run_id", "backend", "tt_rank", "seq_len", "batch_size", "steps", "d_model", "n_heads", "n_layers",
        "tokens_per_sec", "step_time_ms", "peak_vram_mb", "train_loss_last", "val_loss", "timestamp",
        "git_sha",
    )  # fmt: skip
    by_id = {row["run_id"]: row for row in rows}
    assert len(by_id) == len(rows) == 12
    first = by_id["mha/seed_1"]
    summary = json.loads((built["json"].parent / "mha/seed_1/summary.json").read_text())
    assert (first["backend"], first["status"], first["git_sha"]) == ("mha", "finished", "f00ba4")
    assert float(first["val_loss"]) == summary["val_loss"]
    assert float(first["train_loss_last"]) == summary["train_loss"]
    assert by_id["flex/seed_0"]["status"] == "skipped"
    assert by_id["flex/seed_0"]["val_loss"] == ""
    assert "not finite" in by_id["tropical/seed_2"]["notes"]


def test_all_results_have_every_evaluation(built: dict[str, Path]) -> None:
    frame = pl.read_parquet(built["all"])
    assert frame.columns == list(ALL)
    assert ALL[:13] == (
        "run_id", "backend", "tt_rank", "seq_len", "batch", "steps", "tokens_per_sec", "peak_vram_mb",
        "step_time_ms", "train_loss", "val_loss", "perplexity", "notes",
    )  # fmt: skip
    mine = frame.filter((pl.col("run_id") == "flash/seed_0") & (pl.col("split") == "val"))
    assert mine["step"].to_list() == [40, 80, 120, 160, 200]
    assert mine.filter("last")["step"].to_list() == [200]
    assert mine.filter("last")["loss"].item() == mine["val_loss"][0]
    assert frame.filter(pl.col("run_id") == "flex/seed_0").height == 1


@pytest.mark.parametrize("fraction", [8, 2])
def test_a_shrunk_batch_is_in_the_table_and_in_the_flags(fraction: int, tmp_path: Path, make) -> None:
    folder = make.study(tmp_path / "s", {"flash": make.Variant("flash")}, seeds=(0, 1), shape=make.SMALL)
    run = RunFolder(folder / "flash" / "seed_1")
    config = yaml.safe_load(run.config.read_text()) | {"data": {"batch_size": 16 // fraction, "seq_len": 128}}
    run.config.write_text(yaml.safe_dump(config))
    tried = [{"batch_size": 16, "peak_mb": 999.5}]
    fit = {"wanted": 16, "tried": tried, "measured_by": "tensors", "limit_mb": 900.0}
    run.write_status("finished", fit=fit)
    paths = report.build(folder)
    [_, row] = rows_of(paths["sweep"])
    assert (row["batch_size"], row["wanted_batch_size"]) == (str(16 // fraction), "16")
    assert (row["passes_per_step"], row["peak_mb_tried"]) == (str(fraction), "999.5")
    assert "did not fit" in row["notes"]
    [flag] = [f for f in json.loads(paths["json"].read_text())["flags"] if f["code"] == "batch_shrunk"]
    assert f"16 sequences did not fit into memory, so that a pass had {16 // fraction}" in flag["text"]


def test_the_best_run_is_named_and_linked_from_where_the_report_is(tmp_path: Path, make) -> None:
    variants = {"flash": make.Variant("flash"), "other": make.Variant("flash", final=1.2)}
    folder = make.study(tmp_path / "s", variants, seeds=(0, 1), shape=make.SMALL)
    checkpoint = folder / "other" / "seed_0" / "checkpoints" / "step_00000060"
    losses = {
        seed: json.loads((folder / f"other/seed_{seed}/summary.json").read_text())["val_loss"]
        for seed in (0, 1)
    }
    best = min(losses, key=losses.__getitem__)
    checkpoint = folder / "other" / f"seed_{best}" / "checkpoints" / "step_00000060"
    checkpoint.mkdir(parents=True)
    out = tmp_path / "elsewhere" / "report"
    paths = report.build(folder, out=out)
    text = paths["markdown"].read_text()
    assert f"**Best run: other, seed {best}**, with the lowest final loss of 4 runs" in text
    [found] = json.loads(paths["json"].read_text())["best"]
    assert (out / found["link"]).resolve() == checkpoint.resolve()
    assert found["link"] in text
    assert found["link"].replace("=", "%3D") in paths["html"].read_text().replace("=", "=")


def test_the_appendix_has_what_is_shared_once_and_what_differs_by_variant(tmp_path: Path, make) -> None:
    variants = {"flash": make.Variant("flash"), "mha": make.Variant("mha")}
    folder = make.study(tmp_path / "s", variants, seeds=(0,), shape=make.SMALL)
    for name in variants:
        file = folder / name / "seed_0" / "config.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"data": {"seq_len": 128}}))
    paths = report.build(folder)
    found = json.loads(paths["json"].read_text())["appendix"]
    assert found == {
        "shared": {"data.seq_len": 128},
        "variants": {name: {"model.attention.kind": name} for name in variants},
    }
    assert '```yaml\nmodel.attention.kind: "mha"\n```' in paths["markdown"].read_text()
    assert "Appendix: configurations" in paths["html"].read_text()


def test_runs_of_several_folders_make_one_report(tmp_path: Path, make) -> None:
    first = make.study(tmp_path / "a", {"flash": make.Variant("flash")}, seeds=(0, 1), shape=make.SMALL)
    variants = {"flash": make.Variant("flash"), "mha": make.Variant("mha")}
    second = make.study(tmp_path / "b", variants, seeds=(0, 1), shape=make.SMALL, name="second")
    with pytest.raises(HeadwiseError, match="give --out DIR"):
        report.build([first, second])
    paths = report.build([first, second], out=tmp_path / "out")
    data = json.loads(paths["json"].read_text())
    assert [v["name"] for v in data["variants"]] == ["demo/flash", "second/flash", "mha"]
    assert data["baseline"] == "demo/flash"
    assert {row["variant"] for row in data["conclusions"]} == {"second/flash", "mha"}
    ids = [row["run_id"] for row in rows_of(paths["sweep"])]
    assert ids[0] == "a/flash/seed_0"
    assert len(set(ids)) == 6


def test_seeds_given_one_by_one_are_one_variant(tmp_path: Path, make) -> None:
    folders = [make.run(tmp_path / "x" / f"seed_{n}", make.Variant("flash"), n, make.SMALL) for n in (0, 1)]
    paths = report.build(folders, out=tmp_path / "out")
    [variant] = json.loads(paths["json"].read_text())["variants"]
    assert (variant["name"], variant["n"]) == ("x", 2)


def test_other_data_is_refused_and_with_force_marked(
    tmp_path: Path, make, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {
        "flash": make.Variant("flash"),
        "mha": make.Variant("mha", summary={"data_checksum": "another"}),
    }
    folder = make.study(tmp_path / "s", variants, seeds=(0, 1), shape=make.SMALL)
    out = tmp_path / "out"
    with pytest.raises(HeadwiseError, match=r"mha read other data than the baseline.*--force"):
        main([str(folder), "--out", str(out)])
    assert not out.exists()
    assert main([str(folder), "--out", str(out), "--force"]) == 0
    assert "Distrust: different data" in capsys.readouterr().out
    data = json.loads((out / "report.json").read_text())
    assert data["comparisons"] == []
    assert "different_data" in [flag["code"] for flag in data["flags"]]


def test_groups_with_data_of_their_own_are_compared_within(tmp_path: Path, make) -> None:
    copy = {"data_checksum": "copy"}
    variants = {
        "flash": make.Variant("flash"), "mha": make.Variant("mha"),
        "copy_flash": make.Variant("flash", summary=copy), "copy_mha": make.Variant("mha", summary=copy),
    }  # fmt: skip
    folder = make.study(tmp_path / "s", variants, seeds=(0, 1), shape=make.SMALL)
    plan = yaml.safe_load((folder / "study.yaml").read_text())
    for name in ("copy_flash", "copy_mha"):
        plan["variants"][name]["against"] = "copy_flash"
    make.study_yaml(folder, variants=plan["variants"])
    paths = report.build(folder)
    data = json.loads(paths["json"].read_text())
    assert [(row["variant"], row["against"], row["n"]) for row in data["conclusions"]] == [
        ("mha", "flash", 2), ("copy_mha", "copy_flash", 2),
    ]  # fmt: skip
    assert "different_data" not in [flag["code"] for flag in data["flags"]]
    assert len(data["best"]) == 2
    [kind] = data["kinds"]
    assert (kind["kind"], kind["of"]) == ("mha", 2)
    assert "### Of each kind" in paths["markdown"].read_text()


def test_a_pdf_is_made_by_what_is_installed_or_one_sentence_says_why_not(
    tmp_path: Path, make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make.study(tmp_path / "s", {"flash": make.Variant("flash")}, seeds=(0,), shape=make.SMALL)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert main([str(folder), "--pdf"]) == 0
    error = capsys.readouterr().err
    assert "neither a browser (chromium, google-chrome) nor pandoc" in error
    assert error.count("\n") == 1
    script = tmp_path / "bin" / "pandoc"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\nwhile [ "$1" != "-o" ]; do shift; done\nprintf PDF > "$2"\n')
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(pdf, "BROWSERS", ())
    made = write_pdf(folder / "report.html", folder / "report.md")
    assert (made.name, made.read_text()) == ("report.pdf", "PDF")
    script.write_text("#!/bin/sh\necho no engine >&2\nexit 43\n")
    with pytest.raises(HeadwiseError, match="pandoc ended with 43: no engine"):
        write_pdf(folder / "report.html", folder / "report.md")
    assert made.read_text() == "PDF"
