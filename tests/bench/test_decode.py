"""`headwise bench decode` on a CPU, with small shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from headwise.bench import decode
from headwise.cli.main import main


def test_a_quarter_of_the_keys_is_a_quarter_of_the_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "decode", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "tokens_per_sec" in capsys.readouterr().out
    rows = json.loads((tmp_path / "decode-cpu.json").read_text())["rows"]
    by_budget = {(row["kind"], row["budget"]): row for row in rows}
    assert by_budget["selective", 1.0]["speed_vs_full"] == 1.0
    assert by_budget["selective", 0.25]["bytes_vs_full"] == pytest.approx(0.25)
    assert all(row["tokens_per_sec"] > 0 for row in rows)


def test_the_kernel_is_checked_in_the_same_command() -> None:
    assert decode.kernel_error(torch.device("cpu"), torch.float32) < 1e-5
