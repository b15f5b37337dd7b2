"""Heads' values mixed with other values, and heads' outputs times a gate: each in one pass on a GPU.

The definitions are here; on a GPU they hand over to `headwise.functional.mixing.kernel`, which reads and
writes each number once and rounds once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.functional.dispatch import fits_kernel

WIDEST = 256
"""Head width that the kernels take."""


def mixed(own: Tensor, other: Tensor, by: Tensor, by_other: Tensor) -> Tensor:
    """`by * own + by_other * other`.

    Args:
        own, other: `(B, K, T, D)` of one dtype.
        by, by_other: one number each.

    Returns:
        `(B, K, T, D)` in the dtype of `own`.
    """
    if _by_kernel(own) and other.dtype == own.dtype and other.shape == own.shape:
        from headwise.functional.mixing.kernel import mix

        return mix(own, other, by, by_other)
    return by.to(own.dtype) * own + by_other.to(own.dtype) * other


def gated(y: Tensor, logits: Tensor) -> Tensor:
    """`y * sigmoid(logits)`.

    Args:
        y: `(B, H, T, D)`.
        logits: `(B, H, T, D)`, or `(B, H, T, 1)` for one gate a head.

    Returns:
        `(B, H, T, D)` in y's dtype.
    """
    if _by_kernel(y) and logits.is_cuda == y.is_cuda and logits.dtype.is_floating_point:
        from headwise.functional.mixing.kernel import gate

        return gate(y, logits)
    return y * torch.sigmoid(logits).to(y.dtype)


def _by_kernel(x: Tensor) -> bool:
    return fits_kernel(x, WIDEST) and not torch.compiler.is_compiling()
