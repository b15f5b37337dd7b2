"""Kind `tt` on the command line: it trains, tells its parameters, and refuses a rank beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.cli import show_config
from headwise.cli.main import main

PRESET = Path(__file__).parents[3] / "configs" / "exp.copy.tt.r16.yaml"
SMALL = ("--data.seq_len=16", "--data.batch_size=4", "--data.eval_seq_lens=[]", "--model.d_model=32",
         "--training.max_steps=2", "--training.warmup_steps=1", "--device=cpu")  # fmt: skip
COUNT = "attention block: 2,048 parameters, dense would be 4,096"


def test_a_run_trains_and_tells_what_its_attention_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert main(["train", f"--config={PRESET}", *SMALL, "--model.attention.tt.rank=8", f"--out={out}"]) == 0
    assert COUNT in (out / "log.txt").read_text()
    assert '"engine": "sdpa"' in (out / "summary.json").read_text()
    capsys.readouterr()
    show_config.main([str(out), "--n-samples", "1", "--context-length", "16"])
    said = capsys.readouterr().out
    assert COUNT.partition(": ")[2] in said


def test_a_rank_that_is_too_large_is_refused_with_the_maximum(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    argv = ["train", f"--config={PRESET}", *SMALL, "--model.attention.tt.rank=33", f"--out={out}"]
    assert main(argv) == 2
    assert "model.attention.tt.rank is 33, but the matrices of this layer allow at most 32" in (
        capsys.readouterr().err
    )
    assert not out.exists()
