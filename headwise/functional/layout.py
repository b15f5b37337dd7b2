"""The memory layout that every kernel needs: a vector's numbers side by side, and rows not too far apart."""

from __future__ import annotations

import torch
from torch import Tensor

FARTHEST = 1 << 24
"""Stride of rows that kernels take: 128 rows of a tile then lie within 2^31 numbers, as int32 reaches."""


def packed(x: Tensor) -> Tensor:
    """x `(…, D)` as kernels read it: itself where its last stride is 1 and its rows are near, else a copy.

    All other strides are free: transposed, sliced and expanded tensors (stride 0) are read in place.
    """
    near = x.dim() < 2 or x.stride(-2) < FARTHEST
    return x if x.stride(-1) == 1 and near else x.clone(memory_format=torch.contiguous_format)


def room_like(x: Tensor) -> Tensor:
    """Uninitialised memory of the shape of x, packed; laid out as x where x has neither gaps nor repeats."""
    room = torch.empty_like(x)
    return room if room.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
