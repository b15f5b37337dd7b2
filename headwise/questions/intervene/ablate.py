"""Remove heads for one measurement: replace what a head sends to the output projection.

    zero   the head's output is 0
    mean   it is its mean over the tokens of the same samples, so that only what varies is lost

The head is still computed and the model is unchanged afterwards; `headwise prune` removes for good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.errors import one_of
from headwise.questions.intervene.measure import Tokens, memory_to_spare, must_be_finite
from headwise.watch.effect import Effect, Speaker
from headwise.watch.hooks import Change, Layer
from headwise.watch.removal import Head, in_each_layer, removed

HOW = ("zero", "mean")


@dataclass(frozen=True)
class Removal:
    """Heads removed together, and what that did."""

    heads: tuple[Head, ...]
    effect: Effect

    @property
    def name(self) -> str:
        """`3.0 5.11`: layer and head of each."""
        return " ".join(f"{layer.number}.{head}" for layer, head in self.heads)


@torch.no_grad()
def remove(
    speaker: Speaker,
    samples: Tokens,
    sets: Sequence[Sequence[Head]],
    *,
    how: str = "zero",
    batch_size: int = 4,
    advance: Callable[[int], None] = lambda passes: None,
) -> list[Removal]:
    """Measure the model without each set of heads, against the model as it is.

    Args:
        sets: heads to remove together; one measurement for each set.
        how: `zero` or `mean`.
        advance: called with the number of passes just finished.

    Raises:
        HeadwiseError: an unknown `how`, an output that is not finite, or memory runs out.
    """
    one_of("how", how, HOW)
    heads = {head for chosen in sets for head in chosen}
    means = mean_outputs(speaker, samples, heads, batch_size, advance) if how == "mean" else {}
    effects = [Effect() for _ in sets]
    for first in range(0, len(samples), batch_size):
        tokens = samples.batch(first, first + batch_size)
        with memory_to_spare(batch_size):
            before = speaker(tokens)
            must_be_finite(before, speaker.loaded.name)
            for chosen, effect in zip(sets, effects, strict=True):
                with removed(chosen, means):
                    after = speaker(tokens)
                effect.add(speaker, tokens, before, after)
                advance(1)
    return [Removal(tuple(chosen), effect) for chosen, effect in zip(sets, effects, strict=True)]


@torch.no_grad()
def mean_outputs(
    speaker: Speaker,
    samples: Tokens,
    heads: set[Head],
    batch_size: int = 4,
    advance: Callable[[int], None] = lambda passes: None,
) -> dict[Head, Tensor]:
    """The mean output `(D,)` of each head over all tokens of all samples."""
    sums: dict[Head, Tensor] = {}

    def adding(layer: Layer, members: list[int]) -> Change:
        def add(y: Tensor) -> Tensor:
            for head in members:
                total = y[:, head].double().sum((0, 1))
                sums[layer, head] = sums[layer, head] + total if (layer, head) in sums else total
            return y

        return add

    for first in range(0, len(samples), batch_size):
        with memory_to_spare(batch_size), in_each_layer(heads, adding):
            speaker(samples.batch(first, first + batch_size))
        advance(1)
    n = len(samples) * samples.context_length
    return {key: total / n for key, total in sums.items()}
