"""Whole training steps of the 124M shape with selective attention, beside the same with `flash`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from headwise.attention.config import AttentionConfig
from headwise.bench.harness import print_table, save
from headwise.bench.train_step import GPT2, ours
from headwise.training.distributed import find_device


def main(argv: list[str]) -> int:
    """Print the table and write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="headwise bench selective-step", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that it works")
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    shape = dataclasses.replace(GPT2, n_layers=1, d_model=128, n_heads=2) if arguments.quick else GPT2
    batch, tokens = (2, 128) if arguments.quick else (32, 1024)
    rows: list[dict[str, Any]] = []
    for kind in ("flash", "selective"):
        model = dataclasses.replace(shape, attention=AttentionConfig(kind))
        speed = ours(model, batch, tokens, device)
        rows.append({"step of": kind, "step_ms": speed["step_ms"], "tokens_per_sec": speed["tokens_per_sec"]})
    for row in rows:
        row["flash_x"] = row["step_ms"] / rows[0]["step_ms"]
    print_table(rows)
    save("selective-step", rows, arguments.out, device=str(device))
    return 0
