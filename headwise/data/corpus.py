"""A corpus: rows of tokens cut into windows of seq_len, for training and for exact evaluation.

A split is an array `(rows, S)`. A text is one long row; token shards have a row per sequence.
No window crosses the border between rows, so nothing is predicted from a foreign row.

Training cuts each row at a random offset of the epoch, so that window borders move from epoch to
epoch, and takes every window of the epoch once in random order.

Evaluation cuts each row into non-overlapping windows from its start, the last partial one
included (inputs padded with 0, targets with -100): every token of the split but the first of its
row is predicted exactly once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from headwise.data import order
from headwise.data.base import IGNORE, SPLITS, Batch, as_batch
from headwise.errors import HeadwiseError


class Corpus:
    """Tokens in memory or memory-mapped, served by `Data`'s protocol.

    Args:
        splits: for train, val and test an integer array `(rows, S)`.
        seq_len: tokens per sequence, T.
        seed: decides the order of training sequences.
        vocab_size, identity, bytes_per_token: see `Data`.

    Raises:
        HeadwiseError: `seq_len` is longer than a split's rows.
    """

    predictable = False
    entropy_floor: float | None = None

    def __init__(
        self,
        splits: Mapping[str, np.ndarray],
        *,
        seq_len: int,
        seed: int,
        vocab_size: int,
        identity: dict[str, Any],
        bytes_per_token: Mapping[str, float] | None = None,
    ) -> None:
        self.splits = dict(splits)
        self.seed = seed
        self.vocab_size = vocab_size
        self.identity = identity
        self.bytes_per_token = bytes_per_token
        self._set_length(seq_len)

    def _set_length(self, seq_len: int) -> None:
        for split in SPLITS:
            rows, width = self.splits[split].shape
            if rows == 0:
                raise HeadwiseError(f"{self._name()} has no sequences for the {split} split; give more data")
            if seq_len > width:
                raise HeadwiseError(
                    f"data.seq_len={seq_len} is longer than the {split} split of {self._name()}, "
                    f"which has {width} tokens{'' if rows == 1 else ' in each sequence'}; "
                    "use a shorter data.seq_len or more data"
                )
        self.seq_len = seq_len

    def _name(self) -> str:
        return f"data.name={self.identity.get('name')}"

    def at_length(self, seq_len: int) -> Self:
        other = copy.copy(self)
        other._set_length(seq_len)
        return other

    def n_sequences(self, split: str) -> int:
        rows, width = self.splits[split].shape
        if split == "train":
            return rows * self._train_windows
        return rows * -(-(width - 1) // self.seq_len)

    @property
    def _train_windows(self) -> int:
        """Windows per row and epoch: one less than fit, so that the offset is free to move."""
        return max(1, self.splits["train"].shape[1] // self.seq_len - 1)

    def train_indices(self, step: int, n: int) -> np.ndarray:
        return order.train_indices(self.seed, self.n_sequences("train"), step, n)

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        indices = np.asarray(indices, dtype=np.int64)
        n_sequences = self.n_sequences(split)
        epochs, indices = np.divmod(indices, n_sequences)
        rows, windows = np.divmod(indices, n_sequences // len(self.splits[split]))
        starts = windows * self.seq_len
        if split == "train":
            starts = starts + self._offsets(epochs)
        elif epochs.any():
            raise ValueError(f"{split} has {n_sequences} sequences, none has index {indices.max()}")
        return self._cut(self.splits[split], rows, starts)

    def _offsets(self, epochs: np.ndarray) -> np.ndarray:
        spare = self.splits["train"].shape[1] - self._train_windows * self.seq_len
        choices = max(1, min(self.seq_len, spare))
        distinct, which = np.unique(epochs, return_inverse=True)
        return np.array([order.offset(self.seed, int(e), choices) for e in distinct])[which]

    def _cut(self, tokens: np.ndarray, rows: np.ndarray, starts: np.ndarray) -> Batch:
        width = tokens.shape[1]
        columns = starts[:, None] + np.arange(self.seq_len + 1)
        window = tokens[rows[:, None], np.minimum(columns, width - 1)].astype(np.int64)
        inputs, targets = window[:, :-1], window[:, 1:]
        outside = columns >= width
        if outside.any():
            inputs = np.where(outside[:, :-1], 0, inputs)
            targets = np.where(outside[:, 1:], IGNORE, targets)
        return as_batch(np.ascontiguousarray(inputs), np.ascontiguousarray(targets))
