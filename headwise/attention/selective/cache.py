"""Keys and values under selection: the key that was masked most leaves first.

Every slot holds all that a later query needs of its key: k, v, its selection key, the F of each mask
and, in a game of attack and protection, the protection that is left. Of keys that were masked equally
the earliest leaves.

Letters as in `headwise.attention.cache`; `E` is the width of a selection key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.attention.cache import KeyValueCache
from headwise.functional.budget import GONE

if TYPE_CHECKING:
    from headwise.attention.base import Rope
    from headwise.attention.selective.layer import SelectiveAttention, Selector


class SelectiveCache(KeyValueCache):
    """What a selecting layer holds.

    Args:
        attention: the layer, with selection enabled.
        batch, slots, length, like: as of `KeyValueCache`.
    """

    attention: SelectiveAttention

    def __init__(
        self, attention: SelectiveAttention, batch: int, slots: int, length: int, like: Tensor
    ) -> None:
        config, shape = attention.config, attention.shape
        super().__init__(attention, batch, slots, length, like, n_masks=config.masks(shape.n_heads))
        units = self.masks.shape
        precise = torch.float64 if config.accumulate == "float64" else torch.float32
        size = (batch, *units, self.slots)
        self.taken = torch.full(size, GONE, dtype=precise, device=like.device)
        """F, `(B, G, U, S)`; `GONE` in an empty slot, which so is the first to be used."""
        self.now = torch.zeros(1, dtype=torch.int64, device=like.device)
        """Position of the query."""
        self.left: Tensor | None = None
        """Protection left in the game, `(B, G, U, S)`."""
        self.selection_keys: Tensor | None = None
        self.protection_keys: Tensor | None = None
        """`(B, G, U or 1, S, E)`; None where they are among k."""
        x = next(attention.parameters()).new_zeros(1, 1, shape.d_model)
        q = x.new_zeros(1, shape.n_heads, 1, shape.head_dim)
        k = x.new_zeros(1, shape.n_kv_heads, 1, shape.head_dim)
        with torch.no_grad():
            selector, protector = attention.selector(x, q, k, None), attention.protector(q, k)

        def store(keys: Tensor) -> Tensor:
            own = 1 if keys.shape[1] == 1 else units[1]
            return like.new_zeros(batch, units[0], own, self.slots, keys.shape[-1])

        if config.source not in ("head_zero", "linear_combo") or units[0] > 1:
            self.selection_keys = store(selector.k)
        if protector is not None and units[0] > 1:
            self.protection_keys = store(protector.k)
        if config.protection.kind != "none":
            self.left = torch.zeros(size, dtype=precise, device=like.device)

    def parts(self) -> Iterator[Tensor]:
        """Every tensor with a place for each slot."""
        yield from super().parts()
        for part in (self.taken, self.left, self.selection_keys, self.protection_keys):
            if part is not None:
                yield part

    def fill(self, tokens: int) -> None:
        """Look as after `tokens` tokens with random numbers in every slot, for a benchmark."""
        super().fill(tokens)
        self.taken.uniform_(0, 4)
        if self.left is not None:
            self.left.zero_()

    def attend(
        self, x: Tensor, now: Tensor, rope: Rope | None, handed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One token's attention to what is held, itself included.

        Args:
            x, now, rope: as of `LayerCache`.
            handed: selection logits of the layer before by position, `(B, M, length + 1)`.
        """
        attention, config = self.attention, self.attention.config
        self.now = now
        q, k, _, slot = self.hold(x, now, rope)
        self._clear(self.taken, slot)
        selector, protector = attention.selector(x, q, k, rope), attention.protector(q, k)
        if self.selection_keys is not None:
            self.put(self.selection_keys, self._by_group(selector.k), slot)
        if self.protection_keys is not None and protector is not None:
            self.put(self.protection_keys, self._by_group(protector.k), slot)
        y = self.read(q, self._f(), x)
        logits = self._logits(selector, self.selection_keys, first=0)
        if config.residual_logits:
            logits = logits + self._from_before(handed)
            handed = self._hand_on(logits)
        own = None
        if protector is not None:
            second = int(config.protection.kind == "head_two" and self.order.numel() == q.shape[1])
            own = self._logits(protector, self.protection_keys, first=second)
        if self.left is not None:
            self._clear(self.left, slot)
        self._take(logits, own, now)
        return y, handed

    def slot(self) -> Tensor:
        """Where the next key goes, `(B, G)`: empty, or of the key that is dropped."""
        f = self._f().amin(2)
        if self.attention.config.protect_bos:
            f = f.masked_fill(self.position == 0, -torch.inf)
        worst = f == f.amax(-1, keepdim=True)
        return self.position.masked_fill(~worst, torch.iinfo(torch.int32).max).argmin(-1)

    def _f(self) -> Tensor:
        """F as it is subtracted, `(B, G, U, S)`; `GONE` outside of the window."""
        f = self.taken.relu() if self.attention.config.relu_after_cumsum else self.taken
        window = self.attention.window(self.length)
        if window is None:
            return f
        return f.masked_fill((self.now - self.position >= window)[:, :, None], GONE)

    def _logits(self, selector: Selector, stored: Tensor | None, first: int) -> Tensor:
        """Of this query with every slot, `(B, G, U or 1, S)`; keys that are not stored apart are k's."""
        precise = self.taken.dtype
        logits: Tensor
        q = selector.q[:, :, 0].to(precise)
        with torch.autocast(q.device.type, enabled=False):
            if stored is None:  # a sum, which compiles to one pass over the keys
                heads = q.shape[-1] // self.k.shape[-1]
                keys = self.k[:, 0, first : first + heads].to(precise)
                logits = (q.unflatten(-1, (heads, 1, -1)) * keys[:, None]).sum((2, 4))[:, None]
                logits = logits * selector.scale
            else:
                q = self._by_group(q)
                keys = stored.to(precise).transpose(-2, -1)
                logits = q @ keys[:, :, 0] if keys.shape[2] == 1 else (q[..., None, :] @ keys).squeeze(-2)
                logits = logits * selector.scale
        if selector.bias is not None:
            logits = logits + selector.bias[self.masks][..., None]
        return logits

    def _take(self, logits: Tensor, own: Tensor | None, now: Tensor) -> None:
        """Add to F what this query masks for later ones."""
        config = self.attention.config
        attack = torch.where(logits > 0, logits, config.relu_leak * logits)
        spared = torch.zeros_like(self.position, dtype=torch.bool)
        if config.protect_self:
            spared = spared | (self.position == now)
        if config.protect_bos:
            spared = spared | (self.position == 0)
        attack = attack.masked_fill(spared[:, :, None], 0.0)
        if self.left is None:
            self.taken.add_(attack)
            return
        self.taken.add_((attack - self.left).relu())
        self.left.copy_((self.left - attack).relu() + self.attention.strength(logits, own))

    def _from_before(self, handed: Tensor | None) -> Tensor | float:
        """The previous layer's logits on the keys in the slots, mixed; 0 for those it has dropped."""
        residual = self.attention.residual
        if handed is None or residual is None:
            return 0.0
        with torch.autocast(handed.device.type, enabled=False):
            mixed = torch.einsum("nm,bmp->bnp", residual.to(handed.dtype), handed)
        at = self._column()[:, :, None].expand(-1, -1, self.masks.shape[1], -1)
        return mixed[:, self.masks].gather(-1, at)

    def _hand_on(self, logits: Tensor) -> Tensor:
        """Logits by position, `(B, M, length + 1)`; empty slots go to the last column."""
        masks, width = self.attention.config.masks(self.attention.shape.n_heads), self.length + 1
        at = self.masks[:, :, None] * width + self._column()[:, :, None]
        row = logits.new_zeros(len(logits), masks * width)
        row.scatter_(1, at.flatten(1), logits.flatten(1))
        by_position: Tensor = row.unflatten(1, (masks, width))
        return by_position

    def _column(self) -> Tensor:
        return self.position.masked_fill(self.position < 0, self.length).long()

    def _by_group(self, x: Tensor) -> Tensor:
        """`(B, M or 1, …)` of the masks of each group, `(B, G, U or 1, …)`."""
        return x[:, self.masks] if x.shape[1] > 1 else x[:, None].expand(-1, len(self.masks), *x.shape[1:])

    def _clear(self, store: Tensor, slot: Tensor) -> None:
        store[(*self.rows, slice(None), slot)] = 0.0
