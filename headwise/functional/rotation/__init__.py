"""Rotary embeddings: applied to queries and keys, normalised first where asked; and undone.

`rotated` is the definition. On a GPU it hands over to `headwise.functional.rotation.kernel_apply`, which
reads and writes each number once. `headwise.functional.rotation.kernel` undoes a rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.functional.dispatch import fits_kernel
from headwise.functional.rotation.op import rotated_after_norm

EPSILON = 1e-6
"""Added to the mean square of a vector before its root is divided by."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x (…, T, D)` by tables `(T, D)`, in their precision; the result has x's dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    """`weight * x / rms(x)` over the last axis of `x (B, H, T, D)`, laid out `(B, T, H, D)`."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.transpose(1, 2)
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), EPSILON).transpose(1, 2)


def rotated(x: Tensor, tables: tuple[Tensor, Tensor] | None = None, weight: Tensor | None = None) -> Tensor:
    """x normalised where there is a weight, then rotated where there are tables.

    Args:
        x: `(B, H, T, D)`.
        tables: cos and sin of each coordinate at each position, `(T, D)` each, float32 or better; D even.
        weight: of the norm, `(D,)`.

    Returns:
        `(B, H, T, D)` in x's dtype. Kernels round once where the definition rounds after the norm too.
    """
    kernel = fits_kernel(x, 256)
    if kernel and torch.compiler.is_compiling():
        if tables is not None and weight is not None:  # alone, each is fused with its neighbours
            return rotated_after_norm(x, *tables, weight, EPSILON)
    elif kernel and (tables is not None or weight is not None):
        from headwise.functional.rotation.kernel_apply import apply

        return apply(x, tables, weight, EPSILON)
    if weight is not None:
        x = normalised(x, weight)
    return x if tables is None else rotate(x, *tables)
