"""One step of decoding: slots for the boundary form, one vector for the superposition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.attention.cache import KeyValueCache
from headwise.attention.state import StateCache
from headwise.functional.holographic import (
    bind,
    cosine,
    normalised,
    poincare_scores,
    precise,
    reweighted,
    unbind,
)

if TYPE_CHECKING:
    from headwise.attention.base import Rope
    from headwise.attention.holo.layer import HoloAttention


class BoundaryCache(KeyValueCache):
    """Keys and values of the last tokens, read as the boundary form reads them."""

    attention: HoloAttention

    def attend(
        self, x: Tensor, now: Tensor, rope: Rope | None, handed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One token's attention to what is held, and W_b x."""
        y, handed = super().attend(x, now, rope, handed)
        return self.attention.with_boundary(y, x), handed

    def hold(self, x: Tensor, now: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take a token's key and value in; the query comes out gated."""
        q, k, v, slot = super().hold(x, now, rope)
        return self.attention.gated(q), k, v, slot

    def core(self, q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        """Attention to the slots, by products or by distances."""
        attention = self.attention
        if not attention.config.has_distances:
            return super().core(q, k, v, f)
        scores = poincare_scores(q, k, attention.curvature(), attention.config.eps)
        if attention.log_temperature is not None:
            per_head = precise(attention.log_temperature).exp().unflatten(0, (k.shape[1], -1))
            scores = scores * per_head[self.order.flatten()][..., None]
        return (scores - f).softmax(-1).to(v.dtype) @ v


class SuperpositionCache(StateCache):
    """The spectrum of all bound pairs added up, `(B, K, N)`: O(D) a head, however long the text is."""

    attention: HoloAttention

    def __init__(self, attention: HoloAttention, batch: int, slots: int, length: int, like: Tensor) -> None:
        super().__init__(attention, batch, slots, length, like)
        shape = attention.shape
        size = (batch, shape.n_kv_heads, shape.head_dim // 2 + 1, 2)
        self.memory = torch.zeros(size, dtype=self.dtype, device=self.device)
        """Real and imaginary parts, `(B, K, N, 2)`."""
        self.seen: Tensor | None = None
        """log Σ_j exp(τ·a_j) of reweight, `(B, H)`."""
        if attention.config.read == "reweight":
            empty = torch.full((batch, shape.n_heads), -torch.inf, dtype=self.dtype, device=self.device)
            self.seen = empty

    def parts(self) -> Iterator[Tensor]:
        """The sums."""
        yield self.memory
        if self.seen is not None:
            yield self.seen

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Bind, add, read."""
        attention, eps = self.attention, self.attention.config.eps
        self.memory.add_(torch.view_as_real(bind(k, v, eps))[:, :, 0])
        memory = torch.view_as_complex(self.memory)[:, :, None, None]
        found = unbind(q.unflatten(1, (k.shape[1], -1)), memory, eps).flatten(1, 2)
        if self.seen is None:
            return normalised(found, eps)
        logits = cosine(v, found, eps)[..., 0] * attention.temperature()
        self.seen.copy_(torch.logaddexp(self.seen, logits))
        return reweighted(v, (logits - self.seen).exp()[..., None])
