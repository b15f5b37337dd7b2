"""`headwise bench NAME`: one benchmark, of the project or of a kind of attention."""

from __future__ import annotations

import importlib

from headwise.errors import one_of

BENCHMARKS = (
    "train-step", "head-stats", "decode", "profile", "copy", "observe", "compare-memory", "modifiers", "page",
    "sequential", "bisect",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Run one benchmark; returns the exit code."""
    from headwise.attention import KINDS

    modules = {name: f"headwise.bench.{name.replace('-', '_')}" for name in BENCHMARKS}
    for kind in KINDS.values():
        modules |= kind.benchmarks
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: headwise bench NAME [--device cuda] [--out DIR]\n\nnames: " + ", ".join(modules))
        return 0
    name = one_of("benchmark", argv[0], modules)
    code: int = importlib.import_module(modules[name]).main(argv[1:])
    return code
