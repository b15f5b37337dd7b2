"""Which query took how much from which key: the attacks and the mask of every selecting layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from headwise.attention.base import Carry
from headwise.attention.selective.config import SelectiveConfig
from headwise.attention.selective.layer import SelectiveAttention, Selector
from headwise.functional.selective import Protection, attacks, mask_of_head
from headwise.model.budget import selects
from headwise.model.decoder import Decoder
from headwise.watch.hooks import replaced

Make = Callable[[SelectiveAttention, int, Selector, Protection | None, Carry], Tensor]
"""What makes a mask: of a layer, its index, and what the layer's `mask_of` takes."""


@dataclass(frozen=True)
class Selection:
    """What the queries of one layer did to its keys. Arrays are `(M, T, T)` float32, 0 above the diagonal.

    Attributes:
        layer: its index.
        attack: S[i,j], what query i takes from key j for later queries, before any protection.
        taken: F[i,j], what was masked of key j before query i came.
        unprotected: F of the same attacks without protection; None where the layer has none.
        heads: for each mask the heads that are under it.
    """

    layer: int
    attack: np.ndarray
    taken: np.ndarray
    unprotected: np.ndarray | None
    heads: list[list[int]]


@torch.no_grad()
def selections(model: Decoder, tokens: Tensor) -> list[Selection]:
    """Attacks and masks of every layer that selects, for one sequence.

    Args:
        tokens: `(1, T)` int64; a layer's arrays hold M·T² numbers each.
    """
    found: list[Selection] = []

    def keep(
        layer: SelectiveAttention, index: int, selector: Selector, protection: Protection | None, carry: Carry
    ) -> Tensor:
        handed = Carry(carry.logits)
        taken = type(layer).mask_of(layer, selector, protection, carry)
        # with residual logits, what a layer hands on is what it selected by
        residual = layer.config.residual_logits
        logits = carry.logits if residual else selector.logits(layer.config.accumulate == "float64")
        assert logits is not None
        bare = None if protection is None else type(layer).mask_of(layer, selector, None, handed)
        of_heads = mask_of_head(layer.shape.n_heads, taken.shape[1])
        heads = [[h for h, mask in enumerate(of_heads) if mask == m] for m in range(taken.shape[1])]
        found.append(
            Selection(
                index, _array(_attacks(logits, layer.config)), _array(taken),
                None if bare is None else _array(bare), heads,
            )
        )  # fmt: skip
        return taken

    with masks_made_by(model, keep):
        model.hidden(tokens)
    return found


@contextmanager
def masks_made_by(model: Decoder, make: Make) -> Iterator[None]:
    """Have `make` give the mask of every selecting layer, in place of the layer's `mask_of`.

    Masks are made whole meanwhile, however many heads have one of their own.
    """
    with ExitStack() as stack:
        for index, layer in enumerate(model.attentions()):
            if isinstance(layer, SelectiveAttention) and selects(layer):
                stack.enter_context(replaced(layer, "mask_of", partial(make, layer, index)))
                stack.enter_context(_observed(layer))
        yield


@contextmanager
def _observed(layer: SelectiveAttention) -> Iterator[None]:
    """An observed layer makes its mask whole."""
    previous = layer.observer
    layer.observer = previous or (lambda seen: None)
    try:
        yield
    finally:
        layer.observer = previous


def _attacks(logits: Tensor, config: SelectiveConfig) -> Tensor:
    bos, own = config.protect_bos, config.protect_self
    return attacks(logits, protect_bos=bos, protect_self=own, relu_leak=config.relu_leak)


def _array(x: Tensor) -> np.ndarray:
    return x[0].tril().float().cpu().numpy()
