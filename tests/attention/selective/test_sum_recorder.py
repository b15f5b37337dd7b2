"""What a selective run says in its log: which engine it fell back to, and the errors of its sums."""

from __future__ import annotations

from pathlib import Path

from headwise.config.run import from_dict
from headwise.training.run import train

TINY = {
    "model.d_model": 16, "model.n_layers": 2, "model.n_heads": 2, "data.name": "copy", "data.seq_len": 8,
    "data.batch_size": 2, "data.eval_sequences": 4, "training.max_steps": 4, "training.eval_every": 2,
    "training.checkpoint_every": 0, "measure.maps": 0, "device": "cpu",
}  # fmt: skip


def log_of(out: Path, kind: str, **more: bool) -> list[str]:
    train(from_dict(TINY | {"out": str(out), "model.attention.kind": kind} | more))
    return (out / "log.txt").read_text().splitlines()


def test_a_selective_run_logs_its_engine_and_the_errors_of_its_sums(tmp_path: Path) -> None:
    lines = log_of(tmp_path / "run", "selective", **{"measure.sums": True})
    fallen = [line for line in lines if "selective-plain, not selective-fused: no CUDA device" in line]
    assert len(fallen) == 1
    measured = [line.split(" ", 2)[2].split(":")[0] for line in lines if "off float64" in line]
    assert measured == [f"step {step}, layer {layer}" for step in (0, 2, 4) for layer in (0, 1)]


def test_other_runs_log_neither(tmp_path: Path) -> None:
    lines = log_of(tmp_path / "run", "flash", **{"measure.sums": True})
    assert not [line for line in lines if "attention runs on" in line or "off float64" in line]
    assert len([line for line in lines if "attention kind flash has nothing to log" in line]) == 1
    assert not [line for line in log_of(tmp_path / "quiet", "selective") if "off float64" in line]
