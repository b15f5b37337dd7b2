"""Batches on their way to the model: fetched while the device computes, and the time it waited for them."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import NamedTuple

import torch

from headwise.data.base import Batch


class Passes(NamedTuple):
    """The passes of one optimizer step in this process.

    Attributes:
        batches: on the device.
        counted: how many of their targets count.
        wait_s: seconds that the device had nothing to do, for want of them.
    """

    batches: list[Batch]
    counted: int
    wait_s: float


class Feed:
    """Hands out the passes of one optimizer step after the other, on the device.

    On a GPU the next step's batches are copied on a stream of their own while the current step
    computes.
    """

    def __init__(self, batches: Generator[Batch], passes: int, device: torch.device) -> None:
        self._batches, self._passes, self._device = batches, passes, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: Passes | None = None

    def take(self) -> Passes:
        """The passes of the next step."""
        ready = self._ready or self._fetch(busy_until=None)
        self._ready = None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in (tensor for batch in ready.batches for tensor in batch):
                tensor.record_stream(current)
        return ready

    def prefetch(self) -> None:
        """Get the next step's passes on their way, now that the device has the current step to do."""
        if self._stream is not None:
            busy_until = torch.cuda.Event()
            busy_until.record(torch.cuda.current_stream(self._device))
            self._ready = self._fetch(busy_until)

    def _fetch(self, busy_until: torch.cuda.Event | None) -> Passes:
        began = time.perf_counter()
        batches = [next(self._batches) for _ in range(self._passes)]
        starved = busy_until is None or busy_until.query()
        wait_s = time.perf_counter() - began if starved else 0.0
        counted = sum(batch.counted for batch in batches)
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                batches = [
                    Batch(*(t.to(self._device, non_blocking=True) for t in batch)) for batch in batches
                ]
        return Passes(batches, counted, wait_s)

    def close(self) -> None:
        """End the loader's workers."""
        self._batches.close()
