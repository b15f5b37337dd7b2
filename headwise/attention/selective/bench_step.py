"""Whole training steps of the 124M shape with selective attention, beside the same with `flash`."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

from headwise.attention.config import AttentionConfig
from headwise.bench import harness
from headwise.bench.harness import Row, Table, beside
from headwise.bench.train_step import GPT2, ours
from headwise.training.distributed import find_device


def main(argv: list[str]) -> int:
    """`headwise bench selective-step`."""
    arguments = harness.parser("selective-step", __doc__, quick=True).parse_args(argv)
    device = find_device(arguments.device)
    steps = {kind: partial(step_of, kind, device, quick=arguments.quick) for kind in ("flash", "selective")}
    finish = partial(beside, column="step_ms", ratio="flash_x", base={"step of": "flash"})
    return harness.run("selective-step", arguments, [Table(steps, finish)], device=device)


def step_of(kind: str, device: torch.device, *, quick: bool) -> Row:
    """The row of a kind."""
    shape = dataclasses.replace(GPT2, n_layers=1, d_model=128, n_heads=2) if quick else GPT2
    batch, tokens = (2, 128) if quick else (32, 1024)
    speed = ours(dataclasses.replace(shape, attention=AttentionConfig(kind)), batch, tokens, device)
    return {"step of": kind, "step_ms": speed["step_ms"], "tokens_per_sec": speed["tokens_per_sec"]}
