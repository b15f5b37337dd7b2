"""The section on scaling: lines over lengths and ranks, the longest sequences, and what is drawn of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from headwise import report
from headwise.report.scaling import SCALING


@pytest.fixture
def swept(tmp_path: Path, make) -> Path:
    """Kind a at two lengths and two ranks, kind b at two lengths, and a second b with another width."""
    variants, configs = {}, {}

    def add(name: str, kind: str, length: int, rank: int | None = None, width: int = 128) -> None:
        variants[name] = make.Variant(kind, summary={"seq_len": length, "peak_vram_mb": length * 2.0})
        attention: dict[str, Any] = {"kind": kind} | ({} if rank is None else {kind: {"rank": rank}})
        model = {"d_model": width, "attention": attention}
        configs[name] = {"model": model, "data": {"seq_len": length, "batch_size": 8}, "seed": 0}

    for length in (128, 256):
        for rank in (4, 8):
            add(f"a@seq_len={length}@rank={rank}", "a", length, rank)
        add(f"b@seq_len={length}", "b", length)
    add("wide", "b", 128, width=256)
    folder = make.study(tmp_path / "s", variants, seeds=(0, 1), shape=make.SMALL)
    for name, config in configs.items():
        for seed in (0, 1):
            (folder / name / f"seed_{seed}" / "config.yaml").write_text(
                yaml.safe_dump(config | {"seed": seed})
            )
    return folder


def test_a_line_has_what_differs_in_nothing_but_length_or_rank(swept: Path) -> None:
    data = json.loads(report.build(swept, sections=[SCALING])["json"].read_text())["scaling"]
    assert [(p["line"], p["rank"], p["seq_len"], p["n"]) for p in data["points"]] == [
        ("a", 4, 128, 2), ("a", 4, 256, 2), ("a", 8, 128, 2), ("a", 8, 256, 2),
        ("b (b)", None, 128, 2), ("b (b)", None, 256, 2), ("b (wide)", None, 128, 2),
    ]  # fmt: skip
    assert (data["by_length"], data["by_rank"]) == (True, True)
    assert data["points"][1]["results"]["peak_vram_mb"]["mean"] == 512


def test_its_figures_have_the_names_of_the_source(swept: Path) -> None:
    paths = report.build(swept, sections=[SCALING])
    names = {path.name for path in paths["figures"].iterdir()}
    assert {
        "loss_vs_seq_len.png", "vram_vs_seq_len.png", "tokens_vs_seq_len.png", "a_rank_tradeoff.png",
    } <= names  # fmt: skip
    assert "## Scaling: length, rank and memory" in paths["markdown"].read_text()


def test_without_a_second_length_or_rank_there_is_none(tmp_path: Path, make) -> None:
    folder = make.study(tmp_path / "s", {"flash": make.Variant("flash")}, seeds=(0,), shape=make.SMALL)
    paths = report.build(folder, sections=[SCALING])
    assert json.loads(paths["json"].read_text())["scaling"] == {}
    assert "Scaling" not in paths["markdown"].read_text()


@pytest.mark.parametrize(("length", "holds"), [(2048, True), (1984, False)])
def test_the_longest_sequences_decide_the_rule_of_the_length(
    length: int, holds: bool, tmp_path: Path, make
) -> None:
    variants = {"flash": make.Variant("flash", final=1.62), "mha": make.Variant("mha", final=1.62)}
    folder = make.study(tmp_path / "s", variants, seeds=(0, 1, 2), shape=make.SMALL)
    rows = [
        {"variant": name, "kind": name, "limit_mb": 800.0, "until": 4096, "max_seq_len": found,
         "capped": False, "measured_by": "tensors", "tried": []}
        for name, found in (("flash", 1024), ("mha", length))
    ]  # fmt: skip
    (folder / "max_lengths.json").write_text(json.dumps({"rows": rows}))
    paths = report.build(folder, sections=[SCALING])
    data = json.loads(paths["json"].read_text())
    [rule] = [rule for rule in data["verdicts"][0]["rules"] if rule["name"] == "length"]
    assert rule["holds"] is holds
    assert f"trains sequences of {length:,} tokens in 800 MB" in rule["text"]
    assert f"| mha | mha | 800 | {length:,} | tensors |" in paths["markdown"].read_text()
