"""Keys and values under differential attention: each key is read by both queries of a head.

The slots hold what softmax attention's do, D numbers of a key and D of a value for each key/value head; under
version 1 a key is k1 and k2 beside one another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from headwise.attention.cache import KeyValueCache
from headwise.functional.differential import difference, joined, widened

if TYPE_CHECKING:
    from headwise.attention.base import Rope
    from headwise.attention.differential.layer import DifferentialAttention


class DifferentialCache(KeyValueCache):
    """What a differential layer holds; arguments as of `KeyValueCache`."""

    attention: DifferentialAttention

    def attend(
        self, x: Tensor, now: Tensor, rope: Rope | None, handed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One token's attention to what is held, itself included."""
        q, *_ = self.hold(x, now, rope)
        y = self.attention.after(difference(self.attended(q, None)[:, :, None], self.attention.factor(x)))
        projected: Tensor = self.attention.out(y.transpose(1, 2).flatten(2))
        return projected, None

    def projections(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """q `(B, 2H, 1, D)`, k and v `(B, K, 1, D)` of one token."""
        q, k, v = super().projections(x, rope)
        return (q, k, v) if k.shape[1] == v.shape[1] else (widened(q), joined(k), v)
