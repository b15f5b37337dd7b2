"""`headwise per-head-metrics`: kinds compared head by head at equal FLOPs (per-head metrics study)."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run the suite and write its report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="headwise per-head-metrics",
        description="Train each attention kind at equal FLOPs over seeds and compare their heads.",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, action="append", help="repeat for several (default: 0)")
    parser.add_argument("--target-flops", type=float, default=2e8, help="training FLOPs of each run")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a step")
    parser.add_argument("--sequence-len", type=int, default=64, help="tokens a sequence")
    parser.add_argument("--n-layer", type=int, default=2)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--n-kv-head", type=int, help="default: n-head")
    parser.add_argument("--n-embd", type=int, default=64)
    parser.add_argument("--run-id", default=time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--timeout-s", type=float, default=3600, help="seconds of training a run")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--data", default="pystdlib", help="a data.name")
    parser.add_argument("--data-path", help="file or folder, for data that needs one")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", default="runs/per_head_metrics")
    arguments = parser.parse_args(argv)

    from headwise.cli.study import carry_out

    command = "headwise per-head-metrics " + shlex.join(argv)
    return carry_out(make_study(arguments, command), Path(arguments.out))


def make_study(arguments: argparse.Namespace, command: str):  # type: ignore[no-untyped-def]
    """The suite as a study."""
    from headwise.names import folder_name
    from headwise.study.plan import supported_variants
    from headwise.study.study import Study, Variant

    folder_name(arguments.run_id, "--run-id")
    variants = {
        "standard": Variant("standard (SDPA)", "sdpa", {"model.attention.kind": "flash"}),
        "standard_flex": Variant("standard (FlexAttention)", "flex", {"model.attention.kind": "flex"}),
        "tropical": Variant("tropical (margins)", None, {"model.attention.kind": "tropical"}),
    }
    study = Study(
        name=arguments.run_id,
        title="Per-head metrics suite",
        question="Do attention kinds differ, head by head, at equal training FLOPs?",
        baseline="standard",
        base={
            "model": {
                "n_layers": arguments.n_layer,
                "n_heads": arguments.n_head,
                "n_kv_heads": arguments.n_kv_head,
                "d_model": arguments.n_embd,
            },
            "data": {
                "name": arguments.data,
                "path": arguments.data_path,
                "batch_size": arguments.batch_size,
                "seq_len": arguments.sequence_len,
                "eval_fraction": 0.05,
            },
            "training": {"lr": arguments.lr},
            "measure": {"ignore_first": 0},
        },
        variants=supported_variants(variants),
        seeds=arguments.seed or [0],
        budget={"kind": "flops", "value": arguments.target_flops},
        timeout_s=arguments.timeout_s,
        workers=arguments.workers,
        device=arguments.device,
        command=command,
    )
    study.validate()
    return study
