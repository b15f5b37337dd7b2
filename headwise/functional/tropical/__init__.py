"""Tropical (max-plus) attention: sums become maxima, and products sums (per-head metrics study).

    score[i,j] = max_d (q[i,d] + k[j,d]) + mask[i,j];  with centring, minus its maximum over j
    y[i,d]     = max_j (score[i,j] + v[j,d])
    γ[i]       = min_d (best - second best over j of score[i,j] + v[j,d])

The margin γ certifies robustness: values that move by less than γ/2 change no winner. It is +inf where fewer
than two keys are visible.

The gradient of a maximum goes to its winner alone, which is the lowest index of several equal ones. The
gradient of y[i,d] therefore goes to v[j,d] of the winner j and, through score[i,j], to q[i,e] and k[j,e],
where e is the winner of that score. The backward pass needs the O(T·D) winners j and nothing else: it finds e
again in O(D).

Letters: `B` batch, `T` tokens, `H` query heads, `K` key/value heads, `D` head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headwise.functional.dispatch import fits_kernel
from headwise.functional.tropical import op
from headwise.functional.tropical.op import FLOP_FORMULAS
from headwise.functional.tropical.reference import definition, read

WIDEST = 256
"""Head width that the kernels take."""

__all__ = [
    "FLOP_FORMULAS", "Tropical", "definition", "slot_attention", "takes_kernel", "tropical_attention",
]  # fmt: skip


class Tropical(NamedTuple):
    """What tropical attention gives: y `(B, H, T, D)`, and γ `(B, H, T)` where it was asked for."""

    y: Tensor
    margin: Tensor | None


def tropical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    centre: bool = False,
    margin: bool = False,
    fused: bool = True,
) -> Tropical:
    """Max-plus attention; extra memory O(T·D), computed in float32 for half-precision inputs.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, K, T, D)` with `H % K == 0`; query head h reads key/value head `h // (H / K)`.
        causal: query i sees keys j <= i only.
        mask: `(B or 1, T, T)`, bool (True = may attend) or additive float, of which -inf, or half the lowest
            number of its dtype and below, hides a key. The kernel takes none: plain PyTorch computes then,
            some queries at a time.
        centre: subtract each query's largest score, over the keys that it sees, from its scores.
        margin: measure γ, in the same pass; without a gradient.
        fused: use the kernels where they fit.

    Returns:
        y of the dtype of q, zeros for a query that may attend to nothing; γ in float32 or better.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(q, k, v)
    kind = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    dtype, (q, k, v) = q.dtype, (x.to(kind) for x in (q, k, v))
    keep = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    fused = fused and fits_kernel(q, WIDEST)
    y, top, _, _, gap = op.forward(q, k, v, _bias(mask, q), causal, keep, margin, fused)
    y = y - top[..., None] if centre else y
    return Tropical(y.to(dtype), gap if margin else None)


def slot_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, *, centre: bool = False) -> Tensor:
    """Attention of one query a head to every slot of a cache; no gradient.

    Args:
        q: `(B, K, R, D)`, R query heads for each key/value head.
        k, v: `(B, K, S, D)`.
        hidden: `(B, K, R, S)`, True where a slot is empty.

    Returns:
        `(B, K, R, D)`.
    """
    bias = torch.zeros_like(hidden, dtype=torch.promote_types(q.dtype, torch.float32))
    y, top, *_ = op.forward(q, k, v, bias.masked_fill(hidden, -torch.inf), False, False, False, False)
    return (y - top[..., None] if centre else y).to(q.dtype)


def takes_kernel(q: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel computes the forward pass."""
    return mask is None and fits_kernel(q, WIDEST)


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as a term of the scores, `(B or 1, 1, T, T)`."""
    mask = read(mask)
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        return mask[:, None]
    precise = torch.promote_types(q.dtype, torch.float32)
    return torch.zeros_like(mask, dtype=precise).masked_fill(~mask, -torch.inf)[:, None]


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q must be (B, H, T, D), k and v (B, K, T, D); {shapes}")
    if q.numel() == 0 or k.numel() == 0:
        raise ValueError(f"q, k and v must not be empty; {shapes}")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"q, k and v must agree in B, T and D, k and v in K too; {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be divisible by key/value heads; {shapes}")
