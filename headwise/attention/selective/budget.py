"""A selecting layer within a context budget: F, with what it no longer holds hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from headwise.attention.base import Carry
from headwise.functional import budget

if TYPE_CHECKING:
    from headwise.attention.selective.layer import SelectiveAttention


class Pruner:
    """F of one layer, with `GONE` for the keys it no longer holds.

    What a layer drops depends on what earlier layers dropped, so layers prune as they run.
    """

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
