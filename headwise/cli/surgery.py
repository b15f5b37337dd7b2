"""`headwise surgery`: add a head to every layer of a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.config import run as configuration
from headwise.errors import HeadwiseError, one_of
from headwise.files import must_be_folder

if TYPE_CHECKING:
    from headwise.config.run import Config
    from headwise.model.config import ModelConfig
    from headwise.runs.weights import Source

LENGTHS = ("training.max_steps", "training.max_tokens", "training.max_flops")
USAGE = (
    "headwise surgery RUN --add-head start|end --init NAME --out DIR [--keep-optimizer] "
    "[--config FILE] [--SECTION.KEY=VALUE ...]"
)
DESCRIPTION = """Write a new run: the weights of RUN with one head more in every layer, of the same width, and
the validation loss before and after. RUN is a run folder, a checkpoint's folder, a nanoGPT-layout .pt file or
hf://owner/name/file. The new run has RUN's configuration; every key of it is a flag here too, such as
--model.attention.kind=KIND. With a length of training among the flags (--training.max_steps,
max_tokens or max_flops) it is trained at once; without one, `headwise train --resume --out DIR` trains it,
and `headwise train --init-from DIR` starts others from it."""


def main(argv: list[str]) -> int:
    """Operate, then train where a length is given; returns the exit code."""
    parser = configuration.make_parser(prog="headwise surgery", usage=USAGE, description=DESCRIPTION)
    _add_own(parser)
    configuration.add_arguments(parser, argv)
    if not argv or {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    name, *rest = argv
    own = _own(name, rest)

    from headwise.model.surgery import INITS, PLACES, refuse
    from headwise.questions.surgery.operate import arguments, model_of, operate, with_new_head
    from headwise.runs.weights import read_source

    one_of("--add-head", own.add_head, PLACES)
    one_of("--init", own.init, INITS)
    source = read_source(name)
    before = model_of(source, own.source_heads)
    refuse(before, own.init, name)
    trains = any(flag.startswith(tuple(f"--{key}" for key in LENGTHS)) for flag in rest)
    _refuse_no_data(source, rest)
    unlimited = [f"--{key}=null" for key in LENGTHS] if trains else []
    config, _ = configuration.parse(parser, [*arguments(source, before), *unlimited, *rest])
    config = with_new_head(config, before, name)
    if own.keep_optimizer:
        training = dataclasses.replace(config.training, keep_optimizer=True)
        config = dataclasses.replace(config, training=training)
    before = _as_trained(before, source, own.source_kind, config)
    operate(source, before, config, place=own.add_head, init=own.init)
    return _train(own.out) if trains else _written(own.out)


def _add_own(parser: Any) -> None:
    add = parser.add_argument
    add(
        "--add-head",
        metavar="PLACE",
        help="start (index 0, whose logits some kinds read for all heads) or end",
    )
    add("--init", metavar="NAME", help="normal, zero, ko_zero, o_zero, k_zero or o_rescaled")
    add("--keep-optimizer", action="store_true",
        help="carry RUN's optimizer state along, with zeros for the new head")  # fmt: skip
    add("--source-heads", type=int, metavar="N", help="heads of a .pt file that does not say")
    add("--source-kind", metavar="KIND", help="the attention that a .pt file was trained with (flash)")


def _own(name: str, rest: list[str]) -> argparse.Namespace:
    """The flags that decide what the configuration starts from."""
    if name.startswith("-"):
        raise HeadwiseError(f"{name} comes before the run; usage: {USAGE}")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_own(own)
    own.add_argument("--out")
    try:
        known, _ = own.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise HeadwiseError(str(error)) from None
    for flag in ("add_head", "init", "out"):
        if getattr(known, flag) is None:
            raise HeadwiseError(f"--{flag.replace('_', '-')} is missing; usage: {USAGE}")
    must_be_folder(known.out)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise HeadwiseError(
            "surgery runs in one process: leave the length of training out, then torchrun "
            "`headwise train --resume --out DIR`"
        )
    return known


def _refuse_no_data(source: Source, rest: list[str]) -> None:
    if source.nanogpt and not any(flag.startswith(("--config", "--data.name")) for flag in rest):
        raise HeadwiseError(
            f"{source.name} says nothing of data and training: give --config FILE, or --data.name, "
            "--data.path and --training.max_steps"
        )


def _as_trained(before: ModelConfig, source: Source, kind: str | None, config: Config) -> ModelConfig:
    """The model of a `.pt` file with what only the user knows of it: its GELU and its attention."""
    from headwise.model.config import MLPS

    if not source.nanogpt:
        if kind is not None:
            raise HeadwiseError(f"--source-kind is for .pt files; {source.name} has a config.yaml that says")
        return before
    attention = dataclasses.replace(config.model.attention, kind=kind or "flash")
    mlp = one_of("model.mlp", config.model.mlp, MLPS)
    before = dataclasses.replace(before, mlp=mlp, attention=attention)
    before.validate()
    return before


def _written(out: str) -> int:
    print(f"{out}\nto train it: headwise train --resume --out {shlex.quote(out)}")
    return 0


def _train(out: str) -> int:
    from headwise.cli.train import main as train
    from headwise.runs.operation import movement, statement

    code = train(["--resume", "--out", out])
    print(statement(*movement(Path(out))))
    return code
