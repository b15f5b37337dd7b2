"""Entanglement entropy of a matrix of attention weights, read as the state of queries and keys.

    Schmidt form     S = -Σ p ln p,  p = λ² / Σ λ²,  λ the singular values of A
    regional form    S_r = -tr ρ ln ρ,  ρ = A_r A_rᵀ / tr(A_r A_rᵀ),  A_r the rows of region r of the queries

A_r A_rᵀ has the eigenvalues λ² of A_r, so the Schmidt form is the regional one with a single region. Both
lie in [0, ln n] for a matrix whose smaller side is n: 0 if all rows are multiples of one row, and ln n if all
singular values are equal, as for the identity. Both come from the variant study (docs/sources.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 1 << 22
"""Elements of the matrices whose eigenvalues are computed at a time, in float64."""


def entanglement_entropy(weights: Tensor) -> Tensor:
    """The Schmidt form.

    Args:
        weights: `(..., R, C)`, of any floating dtype; the eigenvalues are computed in float64.

    Returns:
        Nats, `(...)` float64; NaN where a matrix is zero or not finite.

    Raises:
        ValueError: fewer than two dimensions, or a matrix without an element.
    """
    if weights.dim() < 2 or 0 in weights.shape[-2:]:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; expected (..., R, C) with R, C >= 1")
    batch, (rows, columns) = weights.shape[:-2], weights.shape[-2:]
    matrices = weights.reshape(-1, rows, columns)
    parts = matrices.split(max(1, AT_ONCE // (rows * columns)))
    found = [_entropy(part.double()) for part in parts] or [matrices.new_empty(0, dtype=torch.float64)]
    return torch.cat(found).reshape(batch)


def regional_entropy(weights: Tensor, n_regions: int) -> Tensor:
    """The regional form: the queries, which are rows, split into contiguous regions of equal size.

    Where the rows do not divide, the first regions have one row more.

    Args:
        weights: `(..., R, C)`.
        n_regions: from 1 to R.

    Returns:
        Nats, `(..., n_regions)` float64.

    Raises:
        ValueError: more regions than rows, or none.
    """
    if weights.dim() < 2 or not 1 <= n_regions <= weights.shape[-2]:
        shape = tuple(weights.shape)
        raise ValueError(
            f"n_regions is {n_regions} for weights of shape {shape}; expected 1 to the number of rows"
        )
    regions = weights.tensor_split(n_regions, dim=-2)
    return torch.stack([entanglement_entropy(region) for region in regions], -1)


def _entropy(matrices: Tensor) -> Tensor:
    """Of matrices `(N, R, C)` in float64."""
    finite = matrices.isfinite().all(-1).all(-1)
    matrices = torch.where(finite[:, None, None], matrices, 0)
    size = matrices.abs().amax((-2, -1), keepdim=True)
    matrices = matrices / torch.where(size > 0, size, 1)  # squares neither overflow nor vanish
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    squares = torch.linalg.eigvalsh(matrices @ matrices.mT).clamp_min(0)
    p = squares / squares.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    return torch.where(finite & (size[:, 0, 0] > 0), entropy.clamp_min(0), torch.nan)
