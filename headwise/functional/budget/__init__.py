"""A context budget: a query sees at most m keys, those with the smallest F (selective attention log).

Query i adds key i to the keys that are kept. If there are then more than m, one is dropped permanently: the
key with the largest F[i,j], and the earliest of several equal ones. A query never drops its own key, nor key
0 if that is protected. The whole history is therefore one number per key: the query that drops it.

Without selection F is 0, and the budget is a window over the last m keys.

Letters: `B` batch, `T` tokens, `H` query heads, `K` key/value heads, `M` masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.functional.dispatch import fits_kernel
from headwise.functional.sharing import mask_of_head, per_head

GONE = 1e30
"""F of a dropped key: its weight is exactly 0, and no kernel meets an infinity."""


LONGEST = 16384
"""Sequence that the kernel of `turns` takes."""


def keys_of_share(share: float, length: int, protect_bos: bool) -> int:
    """How many keys a share of `length` is: rounded down, as the selective attention log's int(T · ratio).

    At least the query's own key, and key 0 while that is protected.

    Raises:
        ValueError: the share is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of {share} of the context; it must be above 0 and at most 1")
    least = min(1 + protect_bos, length)
    return max(int(share * length + 1e-9), least)


def turns(taken: Tensor, keys: int, *, protect_bos: bool = True) -> Tensor:
    """The query at which each key is dropped; T for keys that stay to the end.

    Args:
        taken: F by which to drop, `(…, T, T)`; entries with j > i are not read.
        keys: m, how many are held at most.
        protect_bos: key 0 stays.

    Returns:
        `(…, T)` int64. Query i attends to key j <= i while `turns[j] > i`.

    Raises:
        ValueError: m has no room for the keys that must be held.
    """
    length, first = taken.shape[-1], int(protect_bos)
    if keys < min(1 + first, length):
        raise ValueError(f"{keys} keys are too few for the query's own{' and key 0' if protect_bos else ''}")
    if fits_kernel(taken, LONGEST):
        from headwise.functional.budget.kernel_turns import turns as fused

        return fused(taken, keys, first)
    left = torch.full((*taken.shape[:-2], length), length, device=taken.device)
    dropped = torch.zeros_like(left, dtype=torch.bool)
    for query in range(keys, length):
        held = taken[..., query, first:query].masked_fill(dropped[..., first:query], -torch.inf)
        worst = held.argmax(-1, keepdim=True) + first  # of equal values argmax gives the first
        dropped.scatter_(-1, worst, True)
        left.scatter_(-1, worst, query)
    return left


def kept(leaves: Tensor) -> Tensor:
    """Which keys each query still holds, `(…, T, T)` bool, from `turns`; entries with j > i are True."""
    queries = torch.arange(leaves.shape[-1], device=leaves.device)
    return leaves[..., None, :] > queries[:, None]


def kept_afresh(taken: Tensor, keys: int, *, protect_bos: bool = True) -> Tensor:
    """As `kept`, but every query chooses among all keys anew, so that keys return: no cache can do it.

    This is how the selective attention log evaluated.
    """
    length = taken.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=taken.device).triu(1)
    order = taken.masked_fill(future, torch.inf)
    order.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    if protect_bos:
        order[..., 0] = -torch.inf
    latest_first = order.flip(-1).argsort(dim=-1, stable=True)
    rank = torch.empty_like(latest_first)
    rank.scatter_(-1, latest_first, torch.arange(length, device=taken.device).expand_as(rank))
    return (rank.flip(-1) < keys) | future


def least_taken(taken: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """F by which key/value heads drop, `(B, 1 or K, T, T)`: the least among the query heads served.

    Args:
        taken: F, `(B, M, T, T)`.
    """
    if taken.shape[1] == 1:
        return taken
    least: Tensor = per_head(taken, n_heads).unflatten(1, (n_kv_heads, -1)).amin(2)
    return least


def without_dropped(taken: Tensor, keep: Tensor, n_heads: int) -> Tensor:
    """F with `GONE` where a key is dropped, `(B, M or H, T, T)`.

    Args:
        taken: F, `(B, M, T, T)`.
        keep: `(B, 1 or K, T, T)` bool.
    """
    if keep.shape[1] == 1:
        return taken.masked_fill(~keep, GONE)
    keep = keep.repeat_interleave(n_heads // keep.shape[1], dim=1)
    return per_head(taken, n_heads).masked_fill(~keep, GONE)


def kept_by_mask(keep: Tensor, n_heads: int, n_masks: int) -> Tensor:
    """Keys that any head of a mask still holds, `(B, 1 or M, T, T)`, from `keep (B, 1 or K, T, T)`."""
    if keep.shape[1] == 1:
        return keep
    group, masks = n_heads // keep.shape[1], mask_of_head(n_heads, n_masks)
    served = [{head // group for head, mask in enumerate(masks) if mask == m} for m in range(n_masks)]
    return torch.stack([keep[:, sorted(heads)].any(1) for heads in served], dim=1)


def slot_attention(q: Tensor, k: Tensor, v: Tensor, f: Tensor, *, scale: float, fused: bool = True) -> Tensor:
    """Attention of one query a head to every slot of a cache; the softmax runs in float32 or better.

    Args:
        q: `(B, K, R, D)`, R query heads for each key/value head.
        k, v: `(B, K, S, D)`.
        f: F, `(B, K, R, S)`, expanded where heads share it; `GONE` hides a slot.
        scale: factor on q·k.
        fused: use the kernel where it fits; otherwise the definition, with every score in memory.

    Returns:
        `(B, K, R, D)`.
    """
    if fused and fits_kernel(q) and f.numel() and k.shape == v.shape and k.dtype == v.dtype:
        from headwise.functional.budget.kernel_slots import slot_attention as kernel

        return kernel(q.to(k.dtype), k, v, f.float(), scale)
    scores = (q @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) * scale - f
    return scores.softmax(-1).to(v.dtype) @ v
