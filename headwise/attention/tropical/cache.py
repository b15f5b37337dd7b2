"""One step of decoding: the slots of a key/value cache under max-plus attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from headwise.attention.cache import KeyValueCache
from headwise.functional.budget import GONE
from headwise.functional.tropical import slot_attention

if TYPE_CHECKING:
    from headwise.attention.tropical.layer import TropicalAttention


class TropicalCache(KeyValueCache):
    """Keys, as they leave the rotation, and values of the last tokens."""

    attention: TropicalAttention

    def core(self, q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        """The largest offers of the slots."""
        layer = self.attention
        y = slot_attention(*layer.prepared(q, k, v), f == GONE, centre=layer.config.centre)
        return layer.finished(y)

    def read(self, q: Tensor, f: Tensor | None, x: Tensor | None = None) -> Tensor:
        """Attention of q `(B, H, 1, D)` to the slots, projected."""
        return self.attention.finished(super().read(q, f, x))
