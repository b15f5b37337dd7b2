"""`headwise train`: one run from a configuration file and dotted overrides."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

from headwise.config import run as configuration
from headwise.config.run import Config
from headwise.errors import HeadwiseError
from headwise.runs.folder import RunFolder


def main(argv: list[str]) -> int:
    """Train, resume or evaluate; returns the exit code."""
    parser = configuration.make_parser(
        prog="headwise train",
        usage="headwise train --config FILE [--SECTION.KEY=VALUE ...] [--out DIR [--resume | --eval_only]]",
        description="Train one model and measure its heads. Every key of the configuration is a flag.",
    )
    argv = _as_it_was(argv)
    configuration.add_arguments(parser, argv)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly")
    parser.add_argument(
        "--eval_only", "--eval-only", action="store_true", help="evaluate the run in --out, train nothing"
    )
    config, flags = configuration.parse(parser, argv)
    if flags.eval_only:
        return _evaluate(config)
    config = dataclasses.replace(config, out=config.out or str(_new_folder(config, flags)))
    return _train(config, resume=flags.resume)


def _as_it_was(argv: list[str]) -> list[str]:
    """The flags; to go on with a run, over the configuration that it was started with."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--out")
    own.add_argument("--resume", action="store_true")
    own.add_argument("--eval_only", "--eval-only", action="store_true")
    try:
        known, _ = own.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise HeadwiseError(str(error)) from None
    if not (known.resume or known.eval_only):
        return argv
    if known.out is None:
        raise HeadwiseError("--resume and --eval_only need --out, the folder of the run")
    folder = RunFolder(Path(known.out))
    if not folder.holds_run():
        raise HeadwiseError(f"--out {known.out} holds no run: it has no config.yaml")
    folder.refuse_newer()
    return [f"--config={folder.config}", *argv]


def _new_folder(config: Config, flags: Any) -> Path:
    """`runs/<file or data>.<kind>/seed_<n>`, numbered on where that is taken."""
    names = [Path(str(path)).stem for path in flags.config or []]
    stem = names[-1] if names else config.data.name
    kind = config.model.attention.kind
    stem = stem if stem.endswith(kind) else f"{stem}.{kind}"
    base = Path("runs") / stem / f"seed_{config.seed}"
    number, path = 1, base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def _train(config: Config, *, resume: bool) -> int:
    from headwise.training.progress import for_terminal
    from headwise.training.run import train

    leads = os.environ.get("RANK", "0") == "0"
    summary = train(config, resume=resume, progress=for_terminal())
    if not leads:
        return 0
    print(_conclusion(summary, config))
    if summary["state"] == "interrupted":
        print(f"to go on: headwise train --resume --out {shlex.quote(str(config.out))}")
        return 128 + int(summary["signal"])
    return 0 if summary["state"] == "finished" else 1


def _conclusion(summary: dict[str, Any], config: Config) -> str:
    parts = [f"{summary['state']} after {summary['step']} steps ({summary['reason']})"]
    of_now = summary.get("val_step") in (None, summary["step"])
    if summary["val_loss"] is not None:
        at = "" if of_now else f" at step {summary['val_step']}, the last that was evaluated"
        parts.append(f"val loss {summary['val_loss']:.4f}{at}")
        if of_now and summary["val_bits_per_byte"] is not None:
            parts.append(f"{summary['val_bits_per_byte']:.3f} bits/byte")
        if of_now and summary["val_accuracy"] is not None:
            parts.append(f"accuracy {summary['val_accuracy']:.1%}")
    if summary["tokens_per_sec"]:
        parts.append(f"{summary['tokens_per_sec']:,.0f} tokens/s")
    line = ", ".join(parts)
    if summary["val_loss"] is not None and of_now and summary["val_loss"] > 0.99 * summary["chance_loss"]:
        line += (
            f"\nat chance: nothing was learned (ln {summary['vocab_size']} = {summary['chance_loss']:.4f})"
        )
    return f"{line}\n{config.out}"


def _evaluate(config: Config) -> int:
    from headwise.training.evaluate import evaluate_run

    for split, result in evaluate_run(config).items():
        extra = "" if result["bits_per_byte"] is None else f", {result['bits_per_byte']:.4f} bits/byte"
        print(
            f"{split}: loss {result['loss']:.6f}, perplexity {result['perplexity']:.4f}{extra}, "
            f"accuracy {result['accuracy']:.2%} over {result['tokens']:,} tokens"
        )
    return 0
