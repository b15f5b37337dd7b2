"""What a model holds of the sequences it reads token by token: a cache for each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.attention.base import Attention, Carry
from headwise.attention.cache import KeyValueCache
from headwise.errors import HeadwiseError


class Cache:
    """What a model holds of the sequences it reads: a `LayerCache` each layer.

    Args:
        layers: the model's attention layers.
        batch: sequences.
        slots: keys each layer holds at most, or one number for each.
        length: of the longest sequence.
        like: gives the dtype and device of keys and values.

    Raises:
        HeadwiseError: a layer cannot go on token by token.
        ValueError: no slot for the keys that are always held.
    """

    def __init__(
        self, layers: Sequence[Attention], batch: int, slots: int | Sequence[int], length: int, like: Tensor
    ) -> None:
        if reason := next(filter(None, (layer.undecodable() for layer in layers)), None):
            raise HeadwiseError(f"this model cannot be decoded token by token: {reason}")
        each = [slots] * len(layers) if isinstance(slots, int) else list(slots)
        self.layers = [layer.cache(batch, few, length, like) for layer, few in zip(layers, each, strict=True)]
        carry = Carry()
        for layer in self.layers:
            if isinstance(layer, KeyValueCache):
                layer.carry = carry
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)
        """Of the next token, `(1,)`."""

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)
