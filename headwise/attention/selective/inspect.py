"""Which query took how much from which key: the attacks and the mask of every selecting layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.attention.base import Carry
from headwise.attention.selective.config import SelectiveConfig
from headwise.attention.selective.layer import SelectiveAttention, Selector
from headwise.functional.selective import Protection, attacks
from headwise.functional.sharing import mask_of_head
from headwise.model.decoder import Decoder
from headwise.questions.masks.selection import Rules, Selection
from headwise.watch.hooks import replaced

Make = Callable[[SelectiveAttention, int, Selector, Protection | None, Carry], Tensor]
"""What makes a mask: of a layer, its index, and what the layer's `mask_of` takes."""


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
            if isinstance(layer, SelectiveAttention) and layer.selects:
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


def rules(options: SelectiveConfig) -> Rules:
    """What attacks may do."""
    return Rules(options.protect_bos, options.protect_self, adds_up=not options.mask_layernorm)


def switches(options: SelectiveConfig) -> dict[str, Any]:
    """The switches that are not at their default, and the source."""
    default = SelectiveConfig()
    names = ("layers", "n_masks", "mask_heads", "protect_bos", "protect_self", "relu_leak",
             "relu_after_cumsum", "residual_logits", "mask_layernorm")  # fmt: skip
    found: dict[str, Any] = {"source": options.source}
    found |= {n: getattr(options, n) for n in names if getattr(options, n) != getattr(default, n)}
    found["protection"] = options.protection.kind
    if options.memory_penalty.epsilon:
        found["memory_penalty"] = options.memory_penalty.epsilon
    return found


def notes(options: SelectiveConfig) -> list[str]:
    """What to keep in mind of the switches when reading the numbers."""
    found = []
    if options.layers is not None:
        found.append(
            f"Only layers {', '.join(map(str, sorted(options.layers)))} select; the others have no mask."
        )
    if options.mask_layernorm:
        found.append(
            "With mask_layernorm F is normalised over keys and masks: it is not the sum of the attacks, so "
            "there are no numbers on which attack lowered which strength."
        )
    if options.residual_logits:
        found.append("With residual_logits the attacks of a layer include those of the layers before it.")
    if options.relu_leak and not options.relu_after_cumsum:
        found.append(
            "With relu_leak queries also give back: F can fall again and be below 0, and a key below 0 "
            "counts as more than one in the kept context."
        )
    return found


def _attacks(logits: Tensor, config: SelectiveConfig) -> Tensor:
    bos, own = config.protect_bos, config.protect_self
    return attacks(logits, protect_bos=bos, protect_self=own, relu_leak=config.relu_leak)


def _array(x: Tensor) -> np.ndarray:
    return x[0].tril().float().cpu().numpy()
