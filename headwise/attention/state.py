"""What a layer holds of a text whose past is a sum: a state of one size, however long the text is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from headwise.attention.base import Attention, Rope


class StateCache:
    """A `LayerCache` of sums; a kind makes them in `__init__` and gives `step` and `parts`.

    Args:
        attention: the layer.
        batch: sequences, all of the same length.
        slots: as many as `length`: a sum cannot hold fewer keys.
        length: of the longest sequence.
        like: gives the device, and the least precision of the sums, which are at least float32.

    Raises:
        ValueError: fewer slots than tokens.
    """

    def __init__(self, attention: Attention, batch: int, slots: int, length: int, like: Tensor) -> None:
        if slots < length:
            raise ValueError(
                f"{slots} slots for {length} tokens: this layer holds a sum, which no key can leave"
            )
        self.attention, self.batch, self.length = attention, batch, length
        self.dtype, self.device = torch.promote_types(like.dtype, torch.float32), like.device

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(part.nbytes for part in self.parts())

    def parts(self) -> Iterator[Tensor]:
        """Every sum, real."""
        raise NotImplementedError

    def fill(self, tokens: int) -> None:
        """Look as after `tokens` tokens with random numbers in every sum, for a benchmark."""
        for part in self.parts():
            part.uniform_(0.0, float(tokens))

    def attend(
        self, x: Tensor, now: Tensor, rope: Rope | None, handed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One token's attention to all that was added, itself included."""
        q, k, v = self.attention.heads(x)
        q, k = rope(q, k) if rope is not None else (q, k)
        y = self.step(q, k, v).to(x.dtype)
        return self.attention.out(y.transpose(1, 2).flatten(2)), None

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add a token and read: q `(B, H, 1, D)`, k and v `(B, K, 1, D)` to y `(B, H, 1, D)`."""
        raise NotImplementedError
