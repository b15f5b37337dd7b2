"""The longest sequence that can be trained in a given memory, found by search."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from headwise.config.run import Config
from headwise.data import open_data
from headwise.training.distributed import find_device
from headwise.training.memory import MEASURED_BY, OutOfMemory, limit_memory, training_peak
from headwise.training.run import with_vocabulary

MULTIPLE = 64
"""Lengths that are tried are multiples of it."""


def longest(fits: Callable[[int], bool], multiple: int, until: int) -> int:
    """The largest multiple of `multiple`, at most `until`, that fits; 0 where none does.

    Doubles while it fits, then bisects between the last that did and the first that did not.

    Args:
        fits: whether a length fits; once one does not, no longer one does.
    """
    most = until // multiple
    if most == 0:
        return 0
    low, high = 0, 1
    while fits(high * multiple):
        if high == most:
            return most * multiple
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * multiple) else (low, middle)
    return low * multiple


def search_length(config: Config, limit: int, until: int) -> dict[str, Any]:
    """Search the longest sequence that trains within `limit` bytes, one sequence a step.

    Args:
        config: its model, precision and vocabulary are used.
        limit: bytes.
        until: the longest length to try.

    Returns:
        `max_seq_len`, whether it was `capped` by `until`, `limit_mb`, `measured_by`, and `tried`: every
        length with its peak memory in MB (None where it ran out) and whether it fits.
    """
    device = find_device(config.device)
    config = with_vocabulary(config, open_data(config.data, config.seed))
    limit_memory(limit, device)
    multiple = min(MULTIPLE, until)
    tried: list[dict[str, Any]] = []

    def fits(length: int) -> bool:
        data = dataclasses.replace(config.data, seq_len=length, batch_size=1, eval_seq_lens=[])
        training = dataclasses.replace(config.training, total_batch_tokens=None)
        model = dataclasses.replace(config.model, max_seq_len=None)
        sized = dataclasses.replace(config, data=data, training=training, model=model)
        try:
            peak: float | None = training_peak(sized, device)
        except OutOfMemory:
            peak = None
        fit = peak is not None and peak <= limit
        tried.append({"seq_len": length, "peak_mb": None if peak is None else peak / 1e6, "fits": fit})
        return fit

    found = longest(fits, multiple, until)
    return {
        "max_seq_len": found, "capped": found == until // multiple * multiple, "limit_mb": limit / 1e6,
        "measured_by": MEASURED_BY[device.type], "tried": tried,
    }  # fmt: skip
