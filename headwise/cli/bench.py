"""`headwise bench NAME`: benchmarks that print a table and write JSON with the environment."""

from __future__ import annotations

import importlib

from headwise.errors import one_of

BENCHMARKS = (
    "train-step", "head-stats", "selective", "selective-step", "decode", "profile", "copy", "observe", "page",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Run one benchmark; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: headwise bench NAME [--device cuda] [--out DIR]\n\nnames: " + ", ".join(BENCHMARKS))
        return 0
    name = one_of("benchmark", argv[0], BENCHMARKS)
    return importlib.import_module(f"headwise.bench.{name.replace('-', '_')}").main(argv[1:])
