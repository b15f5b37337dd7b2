"""Keys and values of what was read, in a fixed number of slots: a full cache, or a context budget.

When all slots are taken, the next key takes the slot of the key that was masked most (of equal ones the
earliest), so a dropped key's memory is used again at once. Without selection that is the earliest key.
Every slot holds all that a later query needs of its key: k, v, its selection key, the F of each mask
and, in a game of attack and protection, the protection that is left.

Key/value heads under the same masks drop the same keys and share slots: a group. Nothing here
changes shape or waits for the device, so that a step can be captured as a CUDA graph.

Letters: `B` batch, `G` groups, `N` key/value heads of a group, `R` query heads per key/value head, `U`
masks of a group, `S` slots, `D` head width, `E` width of a selection key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headwise.attention.base import Attention, Rope
from headwise.attention.selective.layer import SelectiveAttention, Selector
from headwise.errors import HeadwiseError
from headwise.functional.budget import GONE, slot_attention
from headwise.functional.selective import mask_of_head

KINDS = ("mha", "flash", "flex", "selective")
"""Kinds whose past is keys and values."""


class Groups(NamedTuple):
    """Which key/value heads share slots: `heads (G, N)`, their masks `(G, U)`, and of those each query
    head's, `own (G, N, R)`."""

    heads: list[list[int]]
    masks: list[list[int]]
    own: list[list[list[int]]]


def groups(n_heads: int, n_kv_heads: int, n_masks: int) -> Groups:
    """Key/value heads by the masks of the query heads they serve; each alone where sizes would differ."""
    ratio, of_head = n_heads // n_kv_heads, mask_of_head(n_heads, n_masks)
    served = [of_head[at * ratio : (at + 1) * ratio] for at in range(n_kv_heads)]
    by_masks: dict[tuple[int, ...], list[int]] = {}
    for head, used in enumerate(served):
        by_masks.setdefault(tuple(sorted(set(used))), []).append(head)
    heads: list[list[int]] = list(by_masks.values())
    if len({len(group) for group in heads}) > 1:
        heads = [[head] for head in range(n_kv_heads)]
    masks = [sorted(set(served[group[0]])) for group in heads]
    most = max(len(some) for some in masks)
    masks = [some + some[-1:] * (most - len(some)) for some in masks]
    pairs = zip(heads, masks, strict=True)
    own = [[[some.index(mask) for mask in served[head]] for head in group] for group, some in pairs]
    return Groups(heads, masks, own)


class LayerCache:
    """What one layer holds.

    Args:
        attention: the layer.
        batch: sequences, all of the same length.
        slots: keys held at most.
        length: of the longest sequence, which `residual_logits` needs.
        like: gives the dtype and device of keys and values.

    Raises:
        HeadwiseError: a kind or a switch that cannot go on token by token.
        ValueError: no slot for the keys that are always held.
    """

    def __init__(self, attention: Attention, batch: int, slots: int, length: int, like: Tensor) -> None:
        refuse(attention)
        self.attention, self.slots, self.length = attention, slots, length
        self.selective = attention if isinstance(attention, SelectiveAttention) else None
        if self.selective is not None and not self.selective.config.enabled:
            self.selective = None
        shape, config = attention.shape, self.selective and self.selective.config
        if slots < 1 + bool(config and config.protect_bos):
            raise ValueError(f"{slots} slots are too few for the query's own key and those protected")
        split = groups(shape.n_heads, shape.n_kv_heads, config.masks(shape.n_heads) if config else 1)
        g, n = len(split.heads), len(split.heads[0])
        self.order = torch.tensor(split.heads, device=like.device)
        self.rows = (torch.arange(batch, device=like.device)[:, None], torch.arange(g, device=like.device))
        self.inverse = self.order.flatten().argsort()
        self.masks = torch.tensor(split.masks, device=like.device)
        self.own = torch.tensor(split.own, device=like.device)
        self.k = like.new_zeros(batch, g, n, slots, shape.head_dim)
        self.v = torch.zeros_like(self.k)
        empty = torch.arange(-slots, 0, device=like.device, dtype=torch.int32)
        self.position = empty.repeat(batch, g, 1)
        """Of the key in each slot, `(B, G, S)`; negative while it is empty."""
        self.taken: Tensor | None = None
        """F, `(B, G, U, S)`; `GONE` in an empty slot, which so is the first to be used."""
        self.left: Tensor | None = None
        """Protection left in the game, `(B, G, U, S)`."""
        self.selection_keys: Tensor | None = None
        self.protection_keys: Tensor | None = None
        """`(B, G, U or 1, S, E)`; None where they are among k."""
        if config is not None:
            self._add_selection(batch, like)

    def _add_selection(self, batch: int, like: Tensor) -> None:
        attention, shape = self.selective, self.attention.shape
        assert attention is not None
        config, units = attention.config, self.masks.shape
        precise = torch.float64 if config.accumulate == "float64" else torch.float32
        size = (batch, *units, self.slots)
        self.taken = torch.full(size, GONE, dtype=precise, device=like.device)
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

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        parts = (
            self.k, self.v, self.position, self.taken, self.left, self.selection_keys, self.protection_keys,
        )  # fmt: skip
        return sum(part.nbytes for part in parts if part is not None)

    def attend(
        self, x: Tensor, now: Tensor, rope: Rope | None, handed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One token's attention to what is held, itself included.

        Args:
            x: `(B, 1, d_model)`.
            now: its position, `(1,)` int64 on the device.
            rope: rotates by that position.
            handed: selection logits of the layer before by position, `(B, M, length + 1)`.

        Returns:
            y `(B, 1, d_model)`, and what to hand to the next layer.
        """
        q, k, v = self.attention.heads(x)
        q, k = rope(q, k) if rope is not None else (q, k)
        slot = self._slot()
        self._put(self.k, k[:, self.order], slot)
        self._put(self.v, v[:, self.order], slot)
        self.position[(*self.rows, slot)] = now.to(torch.int32)
        if self.selective is None:
            return self._read(q, None), None
        assert self.taken is not None
        self._clear(self.taken, slot)
        selector, protector = self.selective.selector(x, q, k, rope), self.selective.protector(q, k)
        if self.selection_keys is not None:
            self._put(self.selection_keys, self._by_group(selector.k), slot)
        if self.protection_keys is not None and protector is not None:
            self._put(self.protection_keys, self._by_group(protector.k), slot)
        y = self._read(q, self._f())
        logits = self._logits(selector, self.selection_keys, first=0)
        if self.selective.config.residual_logits:
            logits = logits + self._from_before(handed)
            handed = self._hand_on(logits)
        own = None
        if protector is not None:
            second = int(
                self.selective.config.protection.kind == "head_two" and self.order.numel() == q.shape[1]
            )
            own = self._logits(protector, self.protection_keys, first=second)
        if self.left is not None:
            self._clear(self.left, slot)
        self._take(logits, own, now)
        return y, handed

    def _slot(self) -> Tensor:
        """Where the next key goes, `(B, G)`: empty, or of the key that is dropped."""
        if self.taken is None:
            return self.position.argmin(-1)
        assert self.selective is not None
        f = self._f().amin(2)
        if self.selective.config.protect_bos:
            f = f.masked_fill(self.position == 0, -torch.inf)
        worst = f == f.amax(-1, keepdim=True)
        return self.position.masked_fill(~worst, torch.iinfo(torch.int32).max).argmin(-1)

    def _f(self) -> Tensor:
        """F as it is subtracted, `(B, G, U, S)`."""
        assert self.taken is not None
        assert self.selective is not None
        return self.taken.relu() if self.selective.config.relu_after_cumsum else self.taken

    def _read(self, q: Tensor, f: Tensor | None) -> Tensor:
        """Attention of q `(B, H, 1, D)` to the slots, projected."""
        q = q.unflatten(1, (self.order.numel(), -1))[:, self.order.flatten(), :, 0]
        k, v = self.k.flatten(1, 2), self.v.flatten(1, 2)
        if f is None:
            f = torch.where(self.position < 0, GONE, 0.0)[:, :, None]
        size = (*self.order.shape, q.shape[2])
        if f.shape[2] == 1:
            f = f[:, :, :, None].expand(-1, *size, -1)
        else:
            f = f[:, torch.arange(len(self.own), device=q.device)[:, None, None], self.own]
        y = slot_attention(q, k, v, f.flatten(1, 2), scale=self.attention.scale)
        y = y[:, self.inverse] if len(self.order) > 1 else y
        return self.attention.out(y.flatten(1)[:, None])

    def _logits(self, selector: Selector, stored: Tensor | None, first: int) -> Tensor:
        """Of this query with every slot, `(B, G, U or 1, S)`; keys that are not stored apart are k's."""
        assert self.taken is not None
        precise = self.taken.dtype
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
        """What this query masks for later ones: added to F."""
        assert self.selective is not None
        assert self.taken is not None
        config = self.selective.config
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
        self.left.copy_((self.left - attack).relu() + self.selective.strength(logits, own))

    def _from_before(self, handed: Tensor | None) -> Tensor | float:
        """The previous layer's logits on the keys in the slots, mixed; 0 for those it has dropped."""
        assert self.selective is not None
        if handed is None or self.selective.residual is None:
            return 0.0
        with torch.autocast(handed.device.type, enabled=False):
            mixed = torch.einsum("nm,bmp->bnp", self.selective.residual.to(handed.dtype), handed)
        at = self._column()[:, :, None].expand(-1, -1, self.masks.shape[1], -1)
        return mixed[:, self.masks].gather(-1, at)

    def _hand_on(self, logits: Tensor) -> Tensor:
        """Logits by position, `(B, M, length + 1)`; empty slots go to the last column."""
        assert self.selective is not None
        masks, width = self.selective.config.masks(self.attention.shape.n_heads), self.length + 1
        at = self.masks[:, :, None] * width + self._column()[:, :, None]
        row = logits.new_zeros(len(logits), masks * width)
        row.scatter_(1, at.flatten(1), logits.flatten(1))
        return row.unflatten(1, (masks, width))

    def _column(self) -> Tensor:
        return self.position.masked_fill(self.position < 0, self.length).long()

    def _by_group(self, x: Tensor) -> Tensor:
        """`(B, M or 1, …)` of the masks of each group, `(B, G, U or 1, …)`."""
        return x[:, self.masks] if x.shape[1] > 1 else x[:, None].expand(-1, len(self.masks), *x.shape[1:])

    def _put(self, store: Tensor, new: Tensor, slot: Tensor) -> None:
        """Write `new (B, G, N, 1, D)` into the slots `(B, G)`."""
        store[(*self.rows, slice(None), slot)] = new[:, :, :, 0].to(store.dtype)

    def _clear(self, store: Tensor, slot: Tensor) -> None:
        store[(*self.rows, slice(None), slot)] = 0.0


class Cache:
    """What a model holds of the sequences it reads: a `LayerCache` each layer.

    Args:
        layers: the model's attention layers.
        batch: sequences.
        slots: keys each layer holds at most, or one number for each.
        length: of the longest sequence.
        like: gives the dtype and device of keys and values.
    """

    def __init__(
        self, layers: Sequence[Attention], batch: int, slots: int | Sequence[int], length: int, like: Tensor
    ) -> None:
        each = [slots] * len(layers) if isinstance(slots, int) else list(slots)
        self.layers = [
            LayerCache(layer, batch, few, length, like) for layer, few in zip(layers, each, strict=True)
        ]
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)
        """Of the next token, `(1,)`."""

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)


def refuse(attention: Attention) -> None:
    """Raise where a layer cannot go on token by token.

    Raises:
        HeadwiseError: with the reason.
    """
    if attention.kind not in KINDS:
        raise HeadwiseError(
            f"attention kind {attention.kind!r} keeps no keys and values, so it has no cache; "
            f"{', '.join(KINDS)} have"
        )
    if isinstance(attention, SelectiveAttention) and attention.config.mask_layernorm:
        raise HeadwiseError(
            "mask_layernorm divides F by the number of queries still to come, which nobody knows while "
            "text is written; such a model cannot be decoded token by token"
        )
