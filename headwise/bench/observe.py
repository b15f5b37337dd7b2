"""What measuring every head costs a training run at the default evaluation settings."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from headwise.bench import harness
from headwise.config.run import from_dict
from headwise.config.training import TrainingConfig
from headwise.training.run import train

STEPS = 300


def main(argv: list[str]) -> int:
    """Train with and without heads measured, print the table and write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="headwise bench observe", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args(argv)
    rows = [_row(seq_len, batch, arguments.device) for seq_len, batch in ((128, 16), (256, 16))]
    harness.print_table(rows)
    harness.save("observe", rows, arguments.out, device=arguments.device)
    return 0


def _row(seq_len: int, batch: int, device: str) -> dict[str, Any]:
    values = {
        "data": {"seq_len": seq_len, "batch_size": batch},
        "training": {"max_steps": STEPS},
        "device": device,
    }
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        summary = train(from_dict(values | {"out": str(Path(folder) / "run")}))
        total = time.perf_counter() - began
    return {
        "seq_len": seq_len,
        "steps": STEPS,
        "evaluations": 1 + STEPS // TrainingConfig().eval_every,
        "run_s": total,
        "measuring_s": summary["measure_s"],
        "share": summary["measure_s"] / total,
    }
