"""The definition of tropical attention, with everything in memory, `(B, H, T, T, D)`: what the rest is tested
against."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.functional.softmax_attention import additive_mask, zero_rows


def definition(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, centre: bool = False
) -> tuple[Tensor, Tensor]:
    """As `headwise.functional.tropical_attention`, in float32 or better, with PyTorch's own gradients.

    Returns:
        y `(B, H, T, D)`, and the margins `(B, H, T)`.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(precise).repeat_interleave(group, dim=1) for x in (k, v))
    score = (q.to(precise)[:, :, :, None] + k[:, :, None]).max(-1).values
    bias, empty = additive_mask(read(mask), causal=causal, length=q.shape[-2], like=score)
    if bias is not None:
        score = score + bias
    if centre:
        score = score - score.max(-1, keepdim=True).values
    offers = score[..., None] + v[:, :, None]
    best, winner = offers.max(-2)  # of equal ones PyTorch takes the first, and gives it the gradient
    with torch.no_grad():
        others = offers.scatter(-2, winner[..., None, :], -torch.inf)
        margin = (best - others.amax(-2)).amin(-1)
    if empty is not None:
        margin = margin.masked_fill(empty[..., 0], torch.inf)
    return zero_rows(best, empty).to(q.dtype), margin


def read(mask: Tensor | None) -> Tensor | None:
    """A mask in which -inf alone hides a key: half the lowest number of its dtype and below do, too."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
