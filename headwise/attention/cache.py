"""What one layer holds of a text that is read token by token, in a fixed number of slots.

When all slots are taken, the next key takes the slot of the key that is dropped, so that its memory is used
again at once: of the earliest key here, of the key that was masked most where a kind masks keys.

Key/value heads that drop the same keys share slots: a group. Nothing here changes shape or waits for the
device, so that a step can be captured as a CUDA graph.

Letters: `B` batch, `G` groups, `N` key/value heads of a group, `R` query heads per key/value head, `U`
masks of a group, `S` slots, `D` head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from headwise.attention.carry import Carry
from headwise.functional.budget import GONE, slot_attention
from headwise.functional.sharing import mask_of_head

if TYPE_CHECKING:
    from headwise.attention.base import Attention, Rope


class LayerCache(Protocol):
    """What a layer holds, and its step: all that `headwise.model.cache` knows of a kind.

    Attributes:
        length: tokens of the longest sequence.
    """

    length: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def attend(
        self, x: Tensor, now: Tensor, rope: Rope | None, handed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One token's attention to what is held, itself included.

        Args:
            x: `(B, 1, d_model)`.
            now: its position, `(1,)` int64 on the device.
            rope: rotates by that position.
            handed: what the layer before handed on.

        Returns:
            y `(B, 1, d_model)`, and what to hand to the next layer.
        """
        ...

    def fill(self, tokens: int) -> None:
        """Look as after `tokens` tokens with random numbers in every slot, for a benchmark."""
        ...


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


class KeyValueCache:
    """Keys and values of the last tokens: all of them, or as many as there are slots.

    Args:
        attention: the layer.
        batch: sequences, all of the same length.
        slots: keys held at most.
        length: of the longest sequence.
        like: gives the dtype and device of keys and values.
        n_masks: masks of the layer, which decide the groups.

    Raises:
        ValueError: no slot for the keys that are always held.
    """

    def __init__(
        self, attention: Attention, batch: int, slots: int, length: int, like: Tensor, *, n_masks: int = 1
    ) -> None:
        self.attention, self.slots, self.length = attention, slots, length
        shape = attention.shape
        window = attention.window(length)
        if window is not None:  # no older key is seen again
            slots = self.slots = min(slots, window + attention.keeps_first)
        if slots < 1 + attention.keeps_first:
            raise ValueError(f"{slots} slots are too few for the query's own key and those protected")
        split = groups(shape.n_heads, shape.n_kv_heads, n_masks)
        g, n = len(split.heads), len(split.heads[0])
        self.order = torch.tensor(split.heads, device=like.device)
        self.rows = (torch.arange(batch, device=like.device)[:, None], torch.arange(g, device=like.device))
        self.inverse = self.order.flatten().argsort()
        self.masks = torch.tensor(split.masks, device=like.device)
        self.own = torch.tensor(split.own, device=like.device)
        sunk = attention.sink() is not None
        rooms = [like.new_zeros(batch, g, n, slots + sunk, shape.head_dim) for _ in range(2)]
        self.k, self.v = (room[..., :slots, :] for room in rooms)
        self.whole = [room.flatten(1, 2) for room in rooms]
        """Keys and values of all slots, `(B, K, S, D)`; with one more of zeros where there is a sink."""
        self.carry = Carry()
        """What layers hand to later ones of the same step; the caches of a model share one."""
        empty = torch.arange(-slots, 0, device=like.device, dtype=torch.int32)
        self.position = empty.repeat(batch, g, 1)
        """Of the key in each slot, `(B, G, S)`; negative while it is empty."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(part.nbytes for part in self.parts())

    def parts(self) -> Iterator[Tensor]:
        """Every tensor with a place for each slot."""
        yield from (self.k, self.v, self.position)

    def fill(self, tokens: int) -> None:
        """Look as after `tokens` tokens with random numbers in every slot, for a benchmark."""
        for part in self.parts():
            if part.is_floating_point():
                part.normal_()
        spread = torch.arange(self.slots, device=self.k.device) * tokens // self.slots
        self.position.copy_(spread.to(torch.int32).expand_as(self.position))

    def attend(
        self, x: Tensor, now: Tensor, rope: Rope | None, handed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One token's attention to what is held, itself included."""
        q, _, _, _ = self.hold(x, now, rope)
        return self.read(q, None, x), None

    def hold(self, x: Tensor, now: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take a token's key and value in; gives q, k, v and their slots `(B, G)`."""
        q, k, v = self.projections(x, rope)
        slot = self.slot()
        self.put(self.k, k[:, self.order], slot)
        self.put(self.v, v[:, self.order], slot)
        self.position[(*self.rows, slot)] = now.to(torch.int32)
        return q, k, v, slot

    def projections(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of one token, rotated, as they are held and as q meets them."""
        q, k, v = self.attention.heads(x)
        if self.attention.modifiers is not None:
            v = self.attention.modifiers.values(v, self.carry)
        q, k = rope(q, k) if rope is not None else (q, k)
        return q, k, v

    def slot(self) -> Tensor:
        """Where the next key goes, `(B, G)`: empty, or of the earliest key."""
        return self.position.argmin(-1)

    def read(self, q: Tensor, f: Tensor | None, x: Tensor | None = None) -> Tensor:
        """Attention of q `(B, H, 1, D)` to the slots less F `(B, G, U, S)`, projected.

        Args:
            x: the layer's input `(B, 1, d_model)`, for its gate.
        """
        y = self.attended(q, f)
        if self.attention.modifiers is not None and self.attention.modifiers.gate is not None:
            assert x is not None, "the layer's gate needs the layer's input"
            y = self.attention.modifiers.outputs(x, y[:, :, None])
        projected: Tensor = self.attention.out(y.flatten(1)[:, None])
        return projected

    def attended(self, q: Tensor, f: Tensor | None) -> Tensor:
        """The same before the gate and the output projection, `(B, H, D)`."""
        q = q.unflatten(1, (self.order.numel(), -1))[:, self.order.flatten(), :, 0]
        k, v = self.whole
        if f is None:
            f = torch.where(self.position < 0, GONE, 0.0)[:, :, None]
        size = (*self.order.shape, q.shape[2])
        if f.shape[2] == 1:
            f = f[:, :, :, None].expand(-1, *size, -1)
        else:
            f = f[:, torch.arange(len(self.own), device=q.device)[:, None, None], self.own]
        y = self.core(q, k, v, self.with_sink(f.flatten(1, 2)))
        y = y[:, self.inverse] if len(self.order) > 1 else y
        return y.flatten(1, 2)

    def with_sink(self, f: Tensor) -> Tensor:
        """F `(B, K, R, S)` with the sink in the last slot, whose key is 0: less -c is plus c."""
        sink = self.attention.sink()
        if sink is None:
            return f
        by_group = sink.to(f.dtype).unflatten(0, (f.shape[1], -1))[self.order.flatten()]
        return torch.cat((f, -by_group[None, :, :, None].expand(*f.shape[:3], 1)), dim=-1)

    def core(self, q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        """Attention of one query a head to the slots; q `(B, K, R, D)`, k and v `(B, K, S, D)`.

        Args:
            f: `(B, K, R, S)`; `GONE` hides an empty slot. Heads come in the order of `self.order`.

        Returns:
            `(B, K, R, D)`.
        """
        return slot_attention(q, k, v, f, scale=self.attention.scale)

    def put(self, store: Tensor, new: Tensor, slot: Tensor) -> None:
        """Write `new (B, G, N, 1, D)` into the slots `(B, G)`."""
        store[(*self.rows, slice(None), slot)] = new[:, :, :, 0].to(store.dtype)
