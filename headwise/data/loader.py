"""Batches for the trainer: micro-batches of this process in training order, and exact evaluation."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from headwise.data.base import Batch, Data


class _MicroBatches(Dataset):
    """Index arrays in, training batches out; a worker process holds one of these."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitem__(self, indices: np.ndarray) -> Batch:
        return self.data.batch("train", indices)


def train_loader(
    data: Data,
    batch_sequences: int,
    micro_batch: int,
    *,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch]:
    """Endless micro-batches of this process from optimizer step `start_step` on.

    Each step takes `batch_sequences / world_size / micro_batch` of them: process `rank` has a
    contiguous part of the global batch `data.train_indices(step, batch_sequences)`, so world size,
    accumulation and the number of workers change nothing about which sequences a step sees, nor
    their order. No random state of torch is read or advanced.

    Close the iterator (`.close()`) to end its workers.

    Args:
        batch_sequences: sequences per optimizer step over all processes and micro-batches.
        micro_batch: sequences per batch handed out.
        pin_memory: hand out page-locked tensors; where CUDA is present alone.

    Raises:
        ValueError: the sizes do not divide.
    """
    if batch_sequences % (world_size * micro_batch):
        raise ValueError(
            f"batch_sequences={batch_sequences} is not a multiple of world_size={world_size} "
            f"times micro_batch={micro_batch}"
        )
    return _train_batches(
        DataLoader(
            _MicroBatches(data),
            batch_size=None,
            sampler=_Order(data, batch_sequences, micro_batch, start_step, rank, world_size),
            num_workers=num_workers,
            pin_memory=pin_memory and torch.cuda.is_available(),
            prefetch_factor=4 if num_workers else None,
            multiprocessing_context=_context() if num_workers else None,
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator(),  # or the loader would draw from the global one
        )
    )


def _train_batches(loader: DataLoader) -> Generator[Batch]:
    yield from loader


class _Order:
    """Index arrays of one process's micro-batches, from a step on without end."""

    def __init__(
        self, data: Data, batch: int, micro_batch: int, start_step: int, rank: int, world_size: int
    ) -> None:
        self.data, self.batch, self.micro_batch = data, batch, micro_batch
        self.start_step, self.rank, self.share = start_step, rank, batch // world_size

    def __iter__(self) -> Iterator[np.ndarray]:
        step = self.start_step
        while True:
            indices = self.data.train_indices(step, self.batch)
            own = indices[self.rank * self.share : (self.rank + 1) * self.share]
            yield from own.reshape(-1, self.micro_batch)
            step += 1


def _context() -> str | None:
    """Workers are forked where that exists: mapped files are shared with them, not copied."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches workers too; the trainer finishes its step with them and then ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def eval_batches(
    data: Data,
    split: str,
    batch_size: int,
    *,
    fraction: float = 1.0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """A split's sequences in order, each once; with `fraction` an evenly spread share of them.

    At fraction 1 every token of a corpus but the first of its row is a target exactly once. The
    last batch may be smaller. Process `rank` gets every `world_size`-th sequence, possibly none,
    so sums of losses and of `Batch.counted` are to be added over the processes.
    """
    total = data.n_sequences(split)
    if total is None:
        raise ValueError(f"the {split} split is endless; evaluate on val or test")
    kept = max(1, round(total * fraction))
    own = (np.arange(kept, dtype=np.int64) * total // kept)[rank::world_size]
    for start in range(0, len(own), batch_size):
        yield data.batch(split, own[start : start + batch_size])
