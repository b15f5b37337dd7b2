"""The data of a pruning: sequences for ranking heads, and others for the loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.data.base import IGNORE, whole_sequences
from headwise.data.sources import open_data
from headwise.errors import HeadwiseError
from headwise.questions.intervene.measure import memory_to_spare
from headwise.watch.effect import Speaker
from headwise.watch.load import Loaded
from headwise.watch.samples import Source, open_samples


@dataclass(frozen=True)
class Sequences:
    """Token ids and targets `(N, T)` int64; a target of -100 does not count."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """In order."""
        yield from zip(self.inputs.split(size), self.targets.split(size), strict=True)

    @property
    def checksum(self) -> str:
        """Of the ids."""
        return hashlib.sha256(self.inputs.numpy().tobytes()).hexdigest()


def open_sequences(
    source: Source, loaded: Loaded, n: int, length: int | None
) -> tuple[Sequences, Sequences, dict[str, Any]]:
    """Twice `n` sequences: those for the loss, those for ranking heads, and the identity of the data.

    The first half ranks heads: a run fills its head table, and measures importance, on its first sequences.

    A run without `source.data` gives its own validation data at its own length, with the targets that its
    training counts.

    Raises:
        HeadwiseError: the data is missing, or has under two sequences.
    """
    if loaded.run is not None and source.data is None:
        data = open_data(loaded.run.data, loaded.run.seed).at_length(length or loaded.run.data.seq_len)
        batch = whole_sequences(data, "val", 2 * n)
        inputs, targets, identity = batch.inputs, batch.targets, {**data.identity, "split": "val"}
    else:
        length = min(length or 512, loaded.longest or length or 512)
        samples = open_samples(source, loaded, n_samples=2 * n, context_length=length)
        ids = samples.batch(0, len(samples))
        inputs, targets, identity = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), samples.identity
    if len(inputs) < 2:
        raise HeadwiseError(f"the data has {len(inputs)} whole sequences; pruning needs at least two")
    half = len(inputs) // 2
    first, second = (Sequences(inputs[part], targets[part]) for part in (slice(half), slice(half, 2 * half)))
    return second, first, identity


@torch.no_grad()
def losses(speaker: Speaker, sequences: Sequences, batch_size: int) -> np.ndarray:
    """Mean cross entropy of each sequence over its targets that count, `(N,)` float64, in nats per token."""
    found = []
    for inputs, targets in sequences.batches(batch_size):
        with memory_to_spare(batch_size):
            logits = speaker(inputs)
            targets = targets.to(logits.device)
            each = F.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
            )
        counted = (targets != IGNORE).sum(1)
        found.append((each.view(targets.shape).double().sum(1) / counted.clamp(min=1)).cpu())
    return torch.cat(found).numpy()
