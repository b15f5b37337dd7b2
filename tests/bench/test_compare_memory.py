"""`headwise bench compare-memory`: kinds side by side, those that cannot run with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwise.cli.main import main

TINY = ["--device", "cpu", "--steps", "3", "--seq-len", "64", "--batch-size", "2", "--d-model", "32",
        "--n-layers", "1", "--n-heads", "2"]  # fmt: skip


def test_a_row_a_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "compare-memory", "--kinds", "mha", "flash", "flex", *TINY, "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "peak memory of tensors: every allocation of PyTorch's CPU allocator" in printed
    rows = json.loads((tmp_path / "compare-memory-cpu.json").read_text())["rows"]
    mha, flash, flex = rows
    assert [row["kind"] for row in rows] == ["mha", "flash", "flex"]
    assert (mha["engine"], flash["engine"]) == ("eager", "sdpa")
    assert mha["parameters"] == flash["parameters"]
    assert mha["peak_mb"] > flash["peak_mb"] > 4 * 4 * flash["parameters"] / 1e6
    assert flash["peak_mb_vs_first"] == flash["peak_mb"] / mha["peak_mb"]
    assert mha["tokens_per_sec"] == pytest.approx(1e3 * 2 * 64 / mha["step_ms"])
    assert flex["peak_mb"] is None
    assert "cannot be trained on a CPU" in flex["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "mah"], "did you mean 'mha'"),
        (["--kinds", "flash", "--model.d_modell=8"], "did you mean 'model.d_model'"),
    ],
)
def test_what_is_not_known_is_refused_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "compare-memory", *arguments, *TINY, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
