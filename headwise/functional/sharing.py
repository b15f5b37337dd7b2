"""Masks F that hide keys from later queries: which head uses which mask, and which weights remain.

Letters: `B` batch, `H` query heads, `M` masks, `T` tokens.
"""

from __future__ import annotations

from torch import Tensor


def mask_of_head(n_heads: int, n_masks: int) -> list[int]:
    """Which mask each head uses: contiguous groups of ⌊H/M⌋; heads left over wrap to masks 0, 1, …

    Raises:
        ValueError: more masks than heads, or none.
    """
    if not 1 <= n_masks <= n_heads:
        raise ValueError(f"{n_masks} masks for {n_heads} heads; there must be 1 to {n_heads}")
    group = n_heads // n_masks
    return [h // group if h < group * n_masks else h - group * n_masks for h in range(n_heads)]


def per_head(mask: Tensor, n_heads: int) -> Tensor:
    """F of each head, `(B, 1 or H, T, T)`, of F by mask `(B, M, T, T)`."""
    if mask.shape[1] in (1, n_heads):
        return mask
    return mask[:, mask_of_head(n_heads, mask.shape[1])]


def kept_context(mask: Tensor, tau: float = 1.0) -> Tensor:
    """How many keys each query still has, M[i] = Σ_{j<=i} (1 - min(F[i,j], τ)/τ).

    Args:
        mask: F, `(B, M, T, T)`.
        tau: what counts as wholly taken.

    Returns:
        `(B, M, T)`, in keys.
    """
    return (1 - mask.clamp(max=tau) / tau).tril().sum(-1)
