"""Differential attention: the difference of two softmaxes over one value (Ye et al. 2024, arXiv 2410.05258).

    A1[i,j] = softmax_j(scale · q1_i·k1_j + mask[i,j]),  A2 likewise of q2 and k2
    y_i = Σ_j (A1[i,j] - λ_i A2[i,j]) v_j

The two queries of head h are the query heads 2h and 2h + 1. Both read the same keys (version 2), or each its
own (version 1). `differential_attention` is the definition, with every weight in memory;
`fused_differential_attention` computes the same with one call of a fused softmax attention.

Letters: `B` batch, `T` tokens, `H` heads, `K` key/value heads, `W` width of a query and a key, `D` width of a
value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.functional.softmax_attention import additive_mask, zero_rows

AT_ONCE = 1 << 24
"""Weights that `negative_weight` holds at a time."""

Softmax = Callable[[Tensor, Tensor, Tensor], Tensor]


def lambda_start(layer: int) -> float:
    """λ_init of version 1 by the index of the layer, from 0: 0.8 - 0.6 exp(-0.3 · layer)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition, with every weight in memory. The softmax runs in float32 for half-precision inputs.

    Args:
        q: `(B, 2H, T, W)`; the queries of head h are 2h and 2h + 1.
        k: `(B, K, T, W)` with `H % K == 0`, where both queries read one key; or `(B, 2K, T, W)`, the keys of
            each pair in turn.
        v: `(B, K, T, D)`; head h reads key/value head `h // (H / K)`.
        lam: λ, `(B or 1, H, T or 1)`.
        causal: query i sees keys j <= i only.
        mask: `(B or 1, T, T)`, bool (True = may attend) or additive float.
        scale: factor on q·k, `W**-0.5` unless given.

    Returns:
        `(B, H, T, D)`; zeros for a query that may attend to nothing.
    """
    q, k, v = _paired(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-2, -1)  # (B, H, 2, T, T)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    bias, empty = additive_mask(mask, causal=causal, length=q.shape[-2], like=scores)
    if bias is not None:
        scores = scores + bias[:, None]
    first, second = scores.softmax(-1).unbind(2)
    weights = first - lam[..., None].to(first.dtype) * second
    return zero_rows(weights.to(v.dtype) @ v, empty)


def fused_differential_attention(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, softmax: Softmax, *, apart: bool = False
) -> Tensor:
    """The same from calls of a softmax attention, in O(T) memory where that has it.

    Two keys of width W beside one another are one key of width 2W, which a query meets that is 0 where the
    other's key lies. So both versions are one attention of 2H query heads on K key/value heads.

    Args:
        q, k, v, lam: as of `differential_attention`.
        softmax: attention of `(B, 2H, T, W')` to `(B, K, T, W')` and v, with mask and scale.
        apart: where every query has a key of its own, call `softmax` once for all first queries and once for
            all second ones instead: no zeros, but queries and keys are narrower than values then, which
            fewer kernels take.

    Returns:
        `(B, H, T, D)`.
    """
    if k.shape[1] != v.shape[1]:
        if apart:
            first, second = (softmax(q[:, n::2], k[:, n::2], v) for n in (0, 1))
            return first - lam[..., None].to(first.dtype) * second
        q, k = widened(q), joined(k)
    return difference(softmax(q, k, v), lam)


def difference(y: Tensor, lam: Tensor) -> Tensor:
    """`y1 - λ y2` `(B, H, T, D)` of what both queries give, `y (B, 2H, T, D)`."""
    first, second = y.unflatten(1, (-1, 2)).unbind(2)
    apart: Tensor = first - lam[..., None].to(y.dtype) * second
    return apart


def widened(q: Tensor) -> Tensor:
    """`(B, 2H, T, 2W)` of `(B, 2H, T, W)`: first queries before W zeros, second ones after them."""
    width = q.shape[-1]
    first, second = q.unflatten(1, (-1, 2)).unbind(2)
    pair = (F.pad(first, (0, width)), F.pad(second, (width, 0)))
    return torch.stack(pair, dim=2).flatten(1, 2)


def joined(k: Tensor) -> Tensor:
    """`(B, K, T, 2W)` of `(B, 2K, T, W)`: the keys of each pair beside one another."""
    beside: Tensor = k.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
    return beside


def head_norm(y: Tensor, weight: Tensor, factor: float, eps: float = 1e-5) -> Tensor:
    """What version 1 does to a head's output `y (B, H, T, D)`: RMSNorm over D times `factor`.

    Args:
        weight: of the norm, `(D,)`, the same for all heads.
        factor: 1 - λ_init, which gives gradients the size that they have without λ.
        eps: of the norm.
    """
    precise = torch.promote_types(y.dtype, torch.float32)
    return (factor * F.rms_norm(y.to(precise), y.shape[-1:], weight.to(precise), eps)).to(y.dtype)


@torch.no_grad()
def negative_weight(
    q: Tensor,
    k: Tensor,
    lam: Tensor,
    *,
    n_kv_heads: int,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    at_once: int = AT_ONCE,
) -> Tensor:
    """How much weight of the difference lies below 0, `Σ_j max(λ A2[i,j] - A1[i,j], 0)`.

    A block of queries at a time, so that about `at_once` weights are in memory and not `B·2H·T²`.

    Args:
        q, k, lam, causal, mask, scale: as of `differential_attention`.
        n_kv_heads: K.
        at_once: weights of a block, at least one row.

    Returns:
        `(B, H, T)` float32 or better; 0 for a query that may attend to nothing.
    """
    batch, _, length, width = q.shape
    q, k, _ = _paired(q, k, k[:, :n_kv_heads])
    scale = width**-0.5 if scale is None else scale
    precise = torch.promote_types(q.dtype, torch.float32)
    lam = lam.to(precise).expand(batch, q.shape[1], length)
    step = max(1, at_once // (2 * batch * q.shape[1] * length))
    position = torch.arange(length, device=q.device)
    found = []
    for low in range(0, length, step):
        rows = slice(low, min(low + step, length))
        scores = (q[..., rows, :] @ k.transpose(-2, -1)).to(precise) * scale  # (B, H, 2, rows, T)
        if mask is not None:
            scores = scores + _bias(mask[:, rows], precise)[:, None, None]
        if causal:
            scores = scores.masked_fill(position > position[rows, None], -torch.inf)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        first, second = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0).unbind(2)
        found.append((lam[..., rows, None] * second - first).relu().sum(-1))
    return torch.cat(found, dim=-1)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def _paired(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k `(B, H, 2 or 1, T, W)` with the two queries of a head apart, and v `(B, H, T, D)`."""
    n_kv_heads = v.shape[1]
    q, k = q.unflatten(1, (-1, 2)), k.unflatten(1, (n_kv_heads, -1))
    group = q.shape[1] // n_kv_heads
    return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
