"""The memory layout that every kernel needs: a vector's numbers side by side, and rows not too far apart."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 16
"""Bytes."""

FARTHEST = 1 << 24
"""Stride of rows that kernels take: 128 rows of a tile then lie within 2^31 numbers, as int32 reaches."""


def padded(width: int) -> int:
    """The width of a tile that holds vectors of `width` numbers: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def packed(x: Tensor) -> Tensor:
    """x `(…, D)` as kernels read it: itself where its rows lie near and begin at 16 bytes, else a copy.

    Transposed, sliced and expanded tensors (stride 0) are read in place where these are met. Rows that begin
    elsewhere are not: Triton 3.6 reads some of them wrongly in 16 bits. A copy has rows of a multiple of 16
    bytes, of which the last numbers are never read.
    """
    apart = ALIGNED // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    near = x.dim() < 2 or x.stride(-2) < FARTHEST
    aligned = x.data_ptr() % ALIGNED == 0 and all(stride % apart == 0 for stride in strides)
    if x.dim() == 1:
        return x if x.stride(0) == 1 else x.clone(memory_format=torch.contiguous_format)
    if (x.stride(-1) == 1 or x.shape[-1] == 1) and near and aligned:
        return x
    wide = x.new_empty((*x.shape[:-1], -(-x.shape[-1] // apart) * apart))
    copy = wide[..., : x.shape[-1]]
    return copy.copy_(x)


def room_like(x: Tensor) -> Tensor:
    """Uninitialised memory of the shape of x, packed; laid out as x where x has neither gaps nor repeats."""
    room = torch.empty_like(x)
    return room if room.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
