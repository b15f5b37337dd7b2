"""Sizes of a run: `full` as in the log; `smallest` trains in a second on a CPU and downloads nothing."""

from __future__ import annotations

import math
from typing import Any

from headwise.notebook.log.translate import SELECTIVE, least_log

PRESETS = ("full", "smallest")
WIDTH = 4
LAYERS = 2

SMALL: dict[str, Any] = {
    "data.name": "copy", "data.vocab_size": 32, "data.eval_sequences": 8, "training.compile": False,
    "training.eval_every": 0, "training.checkpoint_every": 0, "measure.maps": 0, "measure.sequences": 1,
}  # fmt: skip
"""The values that replace the log's in all small runs."""

DROPPED = ("data.path", "model.vocab_size")


def smallest(values: dict[str, Any]) -> dict[str, Any]:
    """A run with the same switches, heads and ratios at a small size.

    The width keeps its ratio to the width of a head. The length is reduced to its square root, the batch to a
    quarter, the passes of a step to 1/32, and the number of steps to its order of magnitude.
    """
    small = {key: value for key, value in values.items() if key not in DROPPED} | SMALL
    width = _head_width(values)
    passes = values["training.total_batch_tokens"] / (values["data.batch_size"] * values["data.seq_len"])
    batch = max(1, values["data.batch_size"] // 4)
    length = max(4, round(math.sqrt(max(1, values["data.seq_len"]))))
    small |= {
        "model.head_dim": width,
        "model.d_model": max(width, values["model.d_model"] * width // values["model.head_dim"]),
        "model.n_layers": LAYERS,
        "data.seq_len": length,
        "data.batch_size": batch,
        "training.total_batch_tokens": batch * length * max(1, int(passes) // 32),
        "training.max_steps": least_log(values["training.max_steps"]),
        "training.warmup_steps": min(1, values["training.warmup_steps"]),
    }
    return small


def _head_width(values: dict[str, Any]) -> int:
    """The smallest width of a head that the number of the run's slices divides."""
    masks = values.get(f"{SELECTIVE}.n_masks", 1)
    sliced = values.get(f"{SELECTIVE}.mask_heads", "sliced") == "sliced"
    return WIDTH * masks // math.gcd(WIDTH, masks) if sliced and 1 <= masks <= HEADS_AT_MOST else WIDTH


HEADS_AT_MOST = 64
