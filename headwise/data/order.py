"""The order of training sequences, as pure functions of (seed, epoch): nothing to save or restore."""

from __future__ import annotations

import functools

import numpy as np


@functools.lru_cache(maxsize=2)  # a step may take the end of one epoch and the start of the next
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the `n` sequences of `epoch`, `(n,)` int64."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(n)
    order.setflags(write=False)
    return order


def offset(seed: int, epoch: int, n: int) -> int:
    """Where `epoch` starts to cut sequences, in [0, n)."""
    return int(np.random.default_rng([seed, epoch, 1]).integers(n))


def train_indices(seed: int, n_sequences: int, step: int, n: int) -> np.ndarray:
    """Indices `epoch * n_sequences + sequence` of the `n` sequences of `step`, `(n,)` int64.

    Over the steps, every sequence of an epoch comes once before the next epoch starts.
    """
    positions = np.arange(step * n, (step + 1) * n, dtype=np.int64)
    epochs, places = np.divmod(positions, n_sequences)
    indices = epochs * n_sequences
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] += permutation(seed, int(epoch), n_sequences)[places[here]]
    return indices
