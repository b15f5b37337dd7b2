"""`headwise prune` as it is typed: what it says first, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from headwise import report
from headwise.cli.main import main
from headwise.questions.prune.files import read
from headwise.questions.sections import sections
from headwise.runs.weights import load_model

TINY = """
model: {d_model: 32, n_layers: 2, n_heads: 4, attention: {kind: flash}}
data: {name: copy, seq_len: 16, batch_size: 4, vocab_size: 16, eval_sequences: 16}
training: {max_steps: 6, warmup_steps: 1, lr: 0.01, log_every: 1, eval_every: 2}
measure: {maps: 0, sequences: 2, importance: true, entanglement: {enabled: true, window: 8}}
device: cpu
"""
FEW = ("--sequences", "6", "--draws", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def run(config: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained run."""
    out = str(tmp_path_factory.mktemp("runs") / "X")
    assert main(["train", "--config", config, "--out", out]) == 0
    return out


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(["prune", *argv]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(["prune", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_conclusion_comes_first_and_the_folder_is_a_run(run: str, capsys) -> None:
    out = said(capsys, run, "--mode", "low", "--fraction", "0.25", *FEW)
    law, against, saves, *_ = out.splitlines()
    assert "entropy predicts which heads matter" in law.lower()
    assert against.startswith("Removing the 25% of heads with the lowest entropy changes the loss by ")
    assert "3 random removals by" in against
    assert saves.startswith("2 of 8 heads are gone: parameters ")
    folder = Path(run) / "prune" / "low-entropy-0.25"
    record = read(folder / "prune.json")
    assert record is not None
    assert record["evaluations"] == 3
    assert record["params"][0] - record["params"][1] == 2 * 4 * 8 * 32
    assert record["flops_per_token"][0] > record["flops_per_token"][1]
    values = sorted(record["heads"], key=lambda head: head["value"])
    assert sorted([h["layer"], h["head"]] for h in values[:2]) == [list(at) for at in record["removed"]]
    model, configuration = load_model(folder)
    left = [after for _, after in record["heads_by_layer"]]
    assert [layer.shape.n_heads for layer in model.attentions()] == left
    assert (configuration.model.heads_by_layer is None) == (left == [3, 3])
    assert model(torch.randint(16, (1, 16))).isfinite().all()
    rows = list(csv.DictReader((folder / "prune_results.csv").open()))
    assert [row["mode"] for row in rows] == ["low", "random", "random", "random"]
    assert [row["draw"] for row in rows] == ["", "0", "1", "2"]
    assert {row["heads_removed"] for row in rows} == {"2"}
    assert float(rows[0]["loss_after"]) - float(rows[0]["loss_before"]) == pytest.approx(
        float(rows[0]["delta"])
    )
    assert {law["measure"] for law in record["law"]} >= {"entropy", "max_weight", "entanglement", "sparsity"}
    assert (folder / "prune.md").read_text().splitlines()[2] == f"- {law}"
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    assert (
        json.loads((folder / "summary.json").read_text())["heads_by_layer"]
        == configuration.model.heads_by_layer
    )
    paths = report.build(Path(run), sections=sections())
    data = json.loads(paths["json"].read_text())
    assert data["pruning"][0]["removed"] == [list(at) for at in record["removed"]]
    assert 'id="pruning-plots"' in paths["html"].read_text()
    assert len(paths["prune_results.csv"].read_text().splitlines()) == 5
    log = list(csv.DictReader(paths["entropy_log.csv"].open()))
    assert len(log) == 4 * 8
    assert all(float(row["entanglement"]) >= 0 and float(row["entropy"]) >= 0 for row in log)


@pytest.mark.parametrize(
    "options",
    [
        ("--mode", "high", "--by", "importance", "--per-layer"),
        ("--mode", "mixed", "--by", "entanglement", "--zero"),
        ("--mode", "random", "--draws", "0"),
        ("--mode", "low", "--by", "max_weight", "--last", "0"),
    ],
)
def test_modes_measures_and_zeroing(run: str, tmp_path: Path, capsys, options: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    said(
        capsys,
        run,
        "--fraction",
        "0.5" if "--per-layer" in options else "0.25",
        *FEW,
        *options,
        "--out",
        str(out),
    )
    record = read(out / "prune.json")
    assert record is not None
    before, _ = load_model(run)
    after, config = load_model(out)
    shrunk = sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in before.parameters())
    assert shrunk != ("--zero" in options)
    if "--per-layer" in options:
        assert config.model.n_heads == 2
        assert config.model.heads_by_layer is None
    assert (record["against_random"] is None) == ("random" in options)


def test_another_measure_than_importance_is_recorded_and_its_law_is_not_of_itself(
    run: str, tmp_path, capsys
) -> None:
    said(capsys, run, "--mode", "random", "--fraction", "0.25", *FEW, "--out", str(tmp_path / "out"))
    record = read(tmp_path / "out" / "prune.json")
    assert record is not None
    assert record["against_random"]["verdict"] == "control"
    assert "importance" not in {law["measure"] for law in record["law"]}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--mode", "lowest", "--fraction", "0.25"), "--mode 'lowest' is not known"),
        (("--mode", "low", "--fraction", "1.5"), "--fraction is 1.5; it is a share of the heads"),
        (("--mode", "low", "--fraction", "0.01"), "is less than one head"),
        (("--mode", "low", "--fraction", "0.25", "--by", "entrpy"), "(did you mean 'entropy'?)"),
        (
            ("--mode", "low", "--fraction", "0.25", "--by", "margin"),
            "has not recorded margin, it has entropy",
        ),
        (("--mode", "low", "--fraction", "0.25", "--draws", "-1"), "--draws is -1"),
        (("--mode", "low", "--fraction", "0.9"), "would remove every head of layer"),
        (("--mode", "random", "--fraction", "0.9"), "cannot leave one in each of 2 layers"),
    ],
)
def test_bad_input_is_one_sentence(
    run: str, tmp_path: Path, capsys, options: tuple[str, ...], sentence: str
) -> None:
    out = tmp_path / "out"
    assert sentence in refused(capsys, run, *options, "--device", "cpu", "--out", str(out))
    assert not out.exists()


def test_heads_that_act_on_one_another_can_only_be_zeroed(config: str, tmp_path: Path, capsys) -> None:
    kind = "--model.attention.kind=selective"
    run = str(tmp_path / "selective")
    assert main(["train", "--config", config, kind, "--out", run]) == 0
    asked = (run, "--mode", "low", "--fraction", "0.25", *FEW)
    assert "whose heads act on one another" in refused(capsys, *asked)
    assert "zeroed, and still computed" in said(capsys, *asked, "--zero")
    assert "is not empty; give another --out" in refused(capsys, *asked, "--zero")


def test_a_run_without_a_head_table_is_told_of(config: str, tmp_path: Path, capsys) -> None:
    run = str(tmp_path / "bare")
    off = ["--measure.heads=false", "--measure.importance=false", "--measure.entanglement.enabled=false"]
    assert main(["train", "--config", config, *off, "--out", run]) == 0
    line = refused(capsys, run, "--mode", "low", "--fraction", "0.25", *FEW)
    assert "has not recorded entropy, it has no table of heads at all" in line
    assert "pass --last 0" in line


def test_a_damaged_record_is_left_out_of_a_report(run: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    said(capsys, run, "--mode", "low", "--fraction", "0.25", *FEW, "--out", str(out))
    whole = (out / "prune.json").read_text()
    for damaged in (
        whole[:-20],
        whole.replace('"removed": [[', '"removed": [["x", '),
        whole.replace('"format": 1', '"format": 2'),
    ):
        assert damaged != whole
        (out / "prune.json").write_text(damaged)
        assert json.loads(report.build(out, sections=sections())["json"].read_text())["pruning"] == []
