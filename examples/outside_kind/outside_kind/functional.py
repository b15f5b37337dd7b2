"""Attention to nothing: the definition, and where it hands over to the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.functional.dispatch import fits_kernel
from headwise.functional.softmax_attention import additive_mask, zero_rows


def nothing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention with one more logit, `offset`, whose weight goes to no key.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, K, T, D)` with `H % K == 0`.
        offset: c of each head, `(H,)`.
        mask: `(B or 1, T, T)`, bool (True = may attend) or additive float.
        causal: query i sees keys j <= i only.
        scale: factor on q·k, `D**-0.5` unless given.

    Returns:
        `(B, H, T, D)`; zeros for a query that may attend to no key.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if takes_kernel(q, k, v, mask, causal):
        from outside_kind.kernel import nothing_attention as fused

        return fused(q, k, v, offset, scale)
    scores, empty = _scores(q, k, mask=mask, causal=causal, scale=scale)
    extra = offset.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, extra), -1).softmax(-1)[..., :-1].to(v.dtype)
    return zero_rows(weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), empty)


def log_sum_exp(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, causal: bool = True, scale: float
) -> Tensor:
    """`log Σ_j exp(s[i,j])` over the keys that a query sees, `(B, H, T)`; -inf where it sees none."""
    scores, empty = _scores(q, k, mask=mask, causal=causal, scale=scale)
    found = scores.logsumexp(-1)
    return found if empty is None else found.masked_fill(empty[..., 0], -torch.inf)


def takes_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether the kernel computes this call: forward only, causal, without a further mask."""
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return causal and mask is None and not needs_gradient and fits_kernel(q) and q.dtype == k.dtype == v.dtype


def _scores(
    q: Tensor, k: Tensor, *, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    bias, empty = additive_mask(mask, causal=causal, length=q.shape[-2], like=scores)
    return (scores if bias is None else scores + bias), empty
