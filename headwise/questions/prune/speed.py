"""How fast two models are, by turns on the same batches."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.analysis.statistics import summarize
from headwise.questions.prune.text import Sequences
from headwise.watch.effect import Speaker

PASSES = 12
"""Timed passes of each model, at least; each batch is timed equally often."""


@torch.no_grad()
def compared(before: Speaker, after: Speaker, sequences: Sequences, batch_size: int) -> dict[str, Any]:
    """Tokens per second of forward passes of full batches, after one to warm up, and the speed-up.

    Returns:
        tokens_per_sec_before and _after, from the median pass; speedup, the geometric mean over paired
        passes, with its 95% interval; passes.
    """
    batches = [inputs for inputs, _ in sequences.batches(batch_size)]
    batches = [inputs for inputs in batches if len(inputs) == len(batches[0])]
    for model in (before, after):
        _timed(model, batches[0])
    rounds = -(-PASSES // len(batches))
    seconds = np.array([[_timed(m, x) for m in (before, after)] for _ in range(rounds) for x in batches])
    ratios = summarize(np.log(seconds[:, 0] / seconds[:, 1]))
    assert ratios.mean is not None
    ends = None
    if ratios.low is not None and ratios.high is not None:
        ends = [math.exp(ratios.low), math.exp(ratios.high)]
    speeds = batches[0].numel() / np.median(seconds, axis=0)
    return {
        "tokens_per_sec_before": float(speeds[0]), "tokens_per_sec_after": float(speeds[1]),
        "speedup": math.exp(ratios.mean), "interval": ends, "passes": len(seconds),
    }  # fmt: skip


def _timed(model: Speaker, inputs: Tensor) -> float:
    device = next(model.loaded.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    model(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
