"""What measuring every head costs a training run at the default evaluation settings."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from headwise.bench import harness
from headwise.config.run import from_dict
from headwise.config.training import TrainingConfig
from headwise.training.run import train

STEPS = 300


def main(argv: list[str]) -> int:
    """`headwise bench observe`."""
    parser = harness.parser("observe", __doc__, device="cpu", lengths="tokens (default: 128 256)")
    arguments = parser.parse_args(argv)
    cases = {f"T {n}": partial(_row, n, 16, arguments.device) for n in arguments.lengths or (128, 256)}
    return harness.run("observe", arguments, [harness.Table(cases)], device=arguments.device)


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
