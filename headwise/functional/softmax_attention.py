"""Softmax attention: its definition, and the masks that every kind shares.

    y_i = Σ_j softmax_j(scale · q_i·k_j + mask[i,j]) v_j

With a sink c_h there is one more logit in the denominator, whose value is zero (Miller 2023); within a
window query i sees the keys with |i - j| < window alone.

Letters: `B` batch, `T` tokens, `H` query heads, `K` key/value heads, `D` head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    sink: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention with every score in memory: the definition that faster engines are tested against.

    The softmax runs in float32 for half-precision inputs.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, K, T, D)` with `H % K == 0`; query head h reads key/value head `h // (H / K)`.
        causal: query i sees keys j <= i only.
        mask: `(B or 1, T, T)`, bool (True = may attend) or additive float.
        scale: factor on q·k, `D**-0.5` unless given.
        dropout: share of weights dropped; pass 0 outside training.
        sink: logits `(H,)` that take a share of every query's weight; None where nothing does.
        window: query i sees the keys with |i - j| < window.

    Returns:
        `(B, H, T, D)`; zeros for a query that may attend to nothing.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    mask = windowed(mask, window, q.shape[-2], q.device)
    bias, empty = additive_mask(mask, causal=causal, length=q.shape[-2], like=scores)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1) if sink is None else softmax_with_sink(scores, sink)
    weights = F.dropout(weights.to(v.dtype), dropout, training=dropout > 0)
    return zero_rows(weights @ v, empty)


def softmax_with_sink(scores: Tensor, sink: Tensor) -> Tensor:
    """Softmax of `scores (B, H, T, T)` and one more logit, `sink (H,)`, whose own weight is left out."""
    null = sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, null), dim=-1).softmax(-1)[..., :-1]


def windowed(mask: Tensor | None, window: int | None, length: int, device: torch.device) -> Tensor | None:
    """`mask` with the keys outside of the window hidden too, `(B or 1, T, T)`.

    Args:
        mask: as in `softmax_attention`.
        window: query i sees the keys with |i - j| < window; None, or as long as the sequence, sees all.
        length: T.
    """
    if window is None or window >= length:
        return mask
    position = torch.arange(length, device=device)
    near = (position[:, None] - position).abs() < window
    if mask is None:
        return near[None]
    return mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, -torch.inf)


def additive_mask(
    mask: Tensor | None, *, causal: bool, length: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Causality and `mask` as one term to add to the scores.

    Args:
        mask: as in `softmax_attention`.
        length: T.
        like: gives the dtype and device of the result.

    Returns:
        bias: `(B or 1, 1, T, T)` or None where nothing is masked. A row that may attend to nothing is
            all zeros in it, so that no softmax meets a row of -inf; its output is to be zeroed.
        empty: `(B or 1, 1, T, 1)`, True for those rows; None where there can be none.
    """
    if mask is None and not causal:
        return None, None
    visible = torch.ones(length, length, dtype=torch.bool, device=like.device)
    visible = visible.tril() if causal else visible
    if mask is None:
        return torch.zeros_like(visible, dtype=like.dtype).masked_fill(~visible, -torch.inf)[None, None], None
    mask = mask[:, None]
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
        bias = bias.masked_fill(~(mask & visible), -torch.inf)
    else:
        bias = mask.to(like.dtype).masked_fill(~visible, -torch.inf)
    empty = (bias == -torch.inf).all(-1, keepdim=True)
    return bias.masked_fill(empty, 0.0), empty


def zero_rows(y: Tensor, empty: Tensor | None) -> Tensor:
    """`y (B, H, T, D)` with zeros where `empty (B or 1, 1, T, 1)` is True."""
    return y if empty is None else y.masked_fill(empty, 0.0)
