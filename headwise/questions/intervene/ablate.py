"""Remove heads for one measurement: replace what a head sends to the output projection.

    zero   the head's output is 0
    mean   it is its mean over the tokens of the same samples, so that only what varies is lost

The head is still computed and the model is unchanged afterwards; `headwise prune` removes for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.errors import one_of
from headwise.questions.intervene.measure import Tokens, memory_to_spare, must_be_finite
from headwise.watch.effect import Effect, Speaker
from headwise.watch.hooks import Change, Changes, Layer, changed

HOW = ("zero", "mean")
Head = tuple[Layer, int]


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


@contextmanager
def removed(heads: Sequence[Head], means: dict[Head, Tensor] | None = None) -> Iterator[None]:
    """Inside the block, each head gives its mean `(D,)`, or zeros where none is given."""
    means = means or {}

    def giving(layer: Layer, members: list[int]) -> Change:
        def give(y: Tensor) -> Tensor:
            y = y.clone()
            for head in members:
                value = means.get((layer, head))
                y[:, head] = 0 if value is None else value.to(y.dtype)
            return y

        return give

    with _in_each_layer(heads, giving):
        yield


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
        with memory_to_spare(batch_size), _in_each_layer(heads, adding):
            speaker(samples.batch(first, first + batch_size))
        advance(1)
    n = len(samples) * samples.context_length
    return {key: total / n for key, total in sums.items()}


@contextmanager
def _in_each_layer(heads: Iterable[Head], change: Callable[[Layer, list[int]], Change]) -> Iterator[None]:
    """Change the outputs of each layer that has some of `heads`."""
    members: dict[Layer, list[int]] = {}
    for layer, head in heads:
        members.setdefault(layer, []).append(head)
    with ExitStack() as stack:
        for layer, own in members.items():
            stack.enter_context(changed(layer, Changes(output=change(layer, own))))
        yield
