"""Layers, inputs and masks for tests of attention kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.attention import KINDS, Attention, AttentionConfig, AttentionShape
from headwise.model.rope import Rope

BATCH, LENGTH = 3, 9

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
"""Two float32 computations of one thing: the outputs below are of size 1 and differ by 3e-6 at worst."""


def make(kind: str, **sizes: Any) -> Attention:
    """A layer in eval mode."""
    default = {"d_model": 20, "n_heads": 4, "n_kv_heads": 4, "head_dim": 6}
    return KINDS[kind](AttentionShape(**(default | sizes)), AttentionConfig(kind=kind).options()).eval()


def inputs(layer: Attention, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """`(B, T, d_model)`, wide enough that logits spread over a few units and weights are far from uniform."""
    return 3 * torch.randn(batch, length, layer.shape.d_model)


def rope_of(layer: Attention) -> Rope:
    return Rope(layer.shape.head_dim)


def form(kind: str) -> dict[str, bool]:
    """The forward's `causal` in a form that the kind takes."""
    return {"causal": "causal" in KINDS[kind].supports}


def random_mask(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Half of the keys hidden, the diagonal visible so that no row is empty."""
    return (torch.rand(batch, length, length) < 0.5) | torch.eye(length, dtype=torch.bool)


def additive(mask: Tensor) -> Tensor:
    """0 where `mask` is True and -inf elsewhere."""
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


def entering_output(layer: Attention, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What the core gave, `(B, T, H·D)`, and the layer's result."""
    seen: list[Tensor] = []
    handle = layer.out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        y = layer(x, **kwargs)
    finally:
        handle.remove()
    return seen[0], y


def masks_for(kind: str) -> list[Tensor | None]:
    """No mask, and one of each form that the kind takes."""
    mask = random_mask()
    supports = KINDS[kind].supports
    found: list[Tensor | None] = [None]
    found += [mask] if "padding" in supports else []
    found += [additive(mask) + torch.randn(mask.shape)] if "additive_mask" in supports else []
    return found
