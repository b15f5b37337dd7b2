"""A model whose layers hold only a share of the context, in one parallel pass: what a cache would do.

A selecting layer drops keys by its own F, which depends on what earlier layers dropped, so layers prune
as they run. A layer of another softmax kind has no F: it keeps a window over its last keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from headwise.attention import Attention, Carry
from headwise.attention.selective.layer import SelectiveAttention
from headwise.errors import HeadwiseError
from headwise.functional import budget
from headwise.model.decoder import Decoder


def selects(attention: Attention) -> bool:
    """Whether a layer has an F to drop keys by."""
    return isinstance(attention, SelectiveAttention) and attention.config.enabled


def protects_bos(attention: Attention) -> bool:
    """Whether a layer never drops key 0."""
    return isinstance(attention, SelectiveAttention) and selects(attention) and attention.config.protect_bos


def full_context_only(attention: Attention) -> str | None:
    """Why a layer can hold nothing less than its whole context; None where it can."""
    if selects(attention) or "padding" in attention.supports:
        return None
    if isinstance(attention, SelectiveAttention):
        return "its selection is disabled, so it has no F to drop keys by"
    return f"its kind, {attention.kind}, has no F and takes no window"


@contextmanager
def within_budget(
    model: Decoder, shares: float | Sequence[float], *, readmit: bool = False
) -> Iterator[None]:
    """While it lasts, every layer of `model` holds at most its share of the sequence.

    Args:
        shares: of every layer, or one for each; in (0, 1].
        readmit: every query chooses afresh among all keys, as document 002 evaluated.

    Raises:
        HeadwiseError: a layer can hold nothing less than everything.
        ValueError: a share outside (0, 1], or not one a layer.
    """
    layers = model.attentions()
    each = [float(shares)] * len(layers) if isinstance(shares, int | float) else [float(s) for s in shares]
    with ExitStack() as stack:
        for layer, (attention, share) in enumerate(zip(layers, each, strict=True)):
            budget.keys_of_share(share, 1, False)
            if share == 1:
                continue
            if reason := full_context_only(attention):
                raise HeadwiseError(f"layer {layer} cannot hold a share of {share} of its context: {reason}")
            if selects(attention):
                assert isinstance(attention, SelectiveAttention)
                attention.prune = _Pruner(attention, share, readmit)
                stack.callback(setattr, attention, "prune", None)
            else:
                stack.enter_context(_window(attention, share))
        yield


class _Pruner:
    """F of one layer, with `GONE` for the keys it no longer holds."""

    def __init__(self, attention: SelectiveAttention, share: float, readmit: bool) -> None:
        self.n_heads, self.n_kv_heads = attention.shape.n_heads, attention.shape.n_kv_heads
        self.share, self.readmit, self.protect_bos = share, readmit, attention.config.protect_bos

    def __call__(self, taken: Tensor, carry: Carry) -> Tensor:
        keys = budget.keys_of_share(self.share, taken.shape[-1], self.protect_bos)
        by = budget.least_taken(taken, self.n_heads, self.n_kv_heads)
        if self.readmit:
            keep = budget.kept_afresh(by, keys, protect_bos=self.protect_bos)
        else:
            keep = budget.kept(budget.turns(by, keys, protect_bos=self.protect_bos))
        if carry.logits is not None:  # a dropped key hands no logit on to the next layer
            held = budget.kept_by_mask(keep, self.n_heads, carry.logits.shape[1])
            carry.logits = carry.logits.masked_fill(~held, 0.0)
        return budget.without_dropped(taken, keep, self.n_heads)


@contextmanager
def _window(attention: Attention, share: float) -> Iterator[None]:
    def narrow(module: torch.nn.Module, inputs: tuple[Tensor], options: dict[str, Any]) -> Any:
        length = inputs[0].shape[1]
        keys = budget.keys_of_share(share, length, protect_bos=False)
        age = torch.arange(length, device=inputs[0].device)
        age = age[:, None] - age
        return inputs, options | {"attn_mask": ((age >= 0) & (age < keys))[None]}

    handle = attention.register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
