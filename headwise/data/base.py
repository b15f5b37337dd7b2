"""What the trainer asks of any data: the protocol, and the batch it hands out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch

IGNORE = -100
"""A target with this value is not counted (the default `ignore_index` of PyTorch's cross entropy)."""

SPLITS = ("train", "val", "test")


class Batch(NamedTuple):
    """Token ids `(B, T)` int64, and for each the next token, or `IGNORE` where none counts."""

    inputs: torch.Tensor
    targets: torch.Tensor

    @property
    def counted(self) -> int:
        """Number of targets that count: the weight of this batch's mean loss."""
        return int((self.targets != IGNORE).sum())


class Data(Protocol):
    """Sequences of tokens in the splits train, val and test.

    Attributes:
        seq_len: tokens per sequence, T.
        vocab_size: ids lie in [0, vocab_size).
        identity: what this data is, for `env.json` and comparisons. `identity["checksum"]` (sha256)
            differs between different data; a run's seed and seq_len of a corpus do not change it.
        bytes_per_token: per split, UTF-8 bytes of the text per token; None when not known.
        predictable: only a part of every sequence can be predicted and counts; accuracy on it
            is the measure of success.
        entropy_floor: the lowest mean loss any model can reach, in nats; None when not known.
    """

    seq_len: int
    vocab_size: int
    identity: dict[str, Any]
    bytes_per_token: Mapping[str, float] | None
    predictable: bool
    entropy_floor: float | None

    def n_sequences(self, split: str) -> int | None:
        """Sequences of one epoch of `train`, or of all of `val` or `test`; None where endless."""
        ...

    def train_indices(self, step: int, n: int) -> np.ndarray:
        """The `n` sequence indices of optimizer step `step`, `(n,)` int64.

        A pure function of the run's seed and of `step * n ... step * n + n - 1`, so a resumed run
        needs the step alone, and the processes of a group slice the same global batch.
        """
        ...

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        """The sequences at `indices`: from `train_indices`, or below `n_sequences(split)`."""
        ...

    def at_length(self, seq_len: int) -> Self:
        """The same data in sequences of another length.

        Raises:
            HeadwiseError: the data is too short for it.
        """
        ...


def whole_sequences(data: Data, split: str, n: int) -> Batch:
    """The first `n` sequences of `val` or `test` that hold no padding, or as many as there are.

    The last window of each row of a corpus is filled up, and targets there do not count. A task that is
    `predictable` in part has such targets too, but fills nothing up.
    """
    total = data.n_sequences(split)
    parts: list[Batch] = []
    first = found = 0
    while found < n and (total is None or first < total):
        last = first + n if total is None else min(first + n, total)
        batch = data.batch(split, np.arange(first, last, dtype=np.int64))
        if not data.predictable:  # the last target may lie beyond the row, the inputs do not
            full = (batch.targets[:, :-1] != IGNORE).all(1)
            batch = Batch(batch.inputs[full], batch.targets[full])
        parts.append(Batch(batch.inputs[: n - found], batch.targets[: n - found]))
        first, found = last, found + len(parts[-1].inputs)
    return Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def as_batch(inputs: np.ndarray, targets: np.ndarray) -> Batch:
    """Numpy arrays `(B, T)` as a batch of int64 tensors, without a copy where they are int64."""
    return Batch(
        torch.from_numpy(inputs.astype(np.int64, copy=False)),
        torch.from_numpy(targets.astype(np.int64, copy=False)),
    )
