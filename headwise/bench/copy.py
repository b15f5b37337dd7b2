"""How many steps a small model needs to copy 64 tokens with 99% accuracy: `configs/exp.copy.*` on a CPU."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from headwise.bench import harness
from headwise.config.run import load
from headwise.errors import one_of
from headwise.runs.folder import RunFolder
from headwise.training.progress import for_terminal
from headwise.training.run import train

CONFIGS = Path(__file__).parents[2] / "configs"


def main(argv: list[str]) -> int:
    """`headwise bench copy`."""
    parser = harness.parser("copy", __doc__, device="cpu")
    parser.add_argument(
        "--kind",
        action="append",
        metavar="KIND",
        help="a kind of which configs/ has exp.copy.KIND.yaml; repeat",
    )
    arguments = parser.parse_args(argv)
    ready = sorted(
        path.name.removeprefix("exp.copy.").removesuffix(".yaml") for path in CONFIGS.glob("exp.copy.*.yaml")
    )
    kinds = [one_of("--kind", kind, ready) for kind in arguments.kind or reversed(ready)]
    table = harness.Table({kind: partial(_row, kind, arguments.device) for kind in kinds})
    return harness.run("copy", arguments, [table], device=arguments.device)


def _row(kind: str, device: str) -> dict[str, Any]:
    config = load(CONFIGS / f"exp.copy.{kind}.yaml")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        summary = train(dataclasses.replace(config, out=str(out), device=device), progress=for_terminal())
        metrics = RunFolder(out).read_metrics()
    reached = [int(m["step"]) for m in metrics if m["split"] == "val" and float(m["accuracy"]) >= 0.99]
    longer = {m["split"]: float(m["accuracy"]) for m in metrics if m["split"].startswith("val@")}
    return {
        "kind": kind,
        "steps": summary["step"],
        "accuracy": summary["val_accuracy"],
        "evaluated_at_99_percent": min(reached, default=None),
        **{f"accuracy_{split}": accuracy for split, accuracy in longer.items()},
        "seconds": summary["wall_s"],
        "tokens_per_sec": summary["tokens"] / summary["wall_s"],
    }
