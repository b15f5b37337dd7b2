"""The memory layout that every kernel needs: a vector's numbers side by side, and rows not too far apart."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 16
"""Bytes that a tensor's first number lies at a multiple of, and numbers that each stride is a multiple of.

Triton compiles a second form of a kernel for arguments that are no multiples of 16, and counts strides in
numbers. In 16 bits that form reads tiles number by number, through registers that it runs out of; on Triton
3.6 it was seen to read wrongly, and was what ran where an illegal access ended a test. It is not used.
"""

FARTHEST = 1 << 24
"""Stride of rows that kernels take: 128 rows of a tile then lie within 2^31 numbers, as int32 reaches."""

REACH = 1 << 31
"""Numbers from the first entry to the last, from which on a tensor of fewer entries is copied."""


def padded(width: int) -> int:
    """The width of a tile that holds vectors of `width` numbers: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def packed(x: Tensor) -> Tensor:
    """x `(…, D)` as kernels read it: itself where its rows are near and aligned, else a copy.

    Transposed, sliced and expanded tensors (stride 0) are read in place where these are met. A copy has
    rows of a multiple of `ALIGNED` numbers, of which the last are never read.
    """
    if x.dim() == 1:
        return x if x.stride(0) == 1 else x.clone(memory_format=torch.contiguous_format)
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    near = x.stride(-2) < FARTHEST and (reach < REACH or x.numel() >= REACH)
    aligned = x.data_ptr() % ALIGNED == 0 and all(stride % ALIGNED == 0 for stride in x.stride()[:-1])
    if (x.stride(-1) == 1 or x.shape[-1] == 1) and near and aligned:
        return x
    wide = x.new_empty((*x.shape[:-1], -(-x.shape[-1] // ALIGNED) * ALIGNED))
    copy = wide[..., : x.shape[-1]]
    return copy.copy_(x)


def room_like(x: Tensor) -> Tensor:
    """Uninitialised memory of the shape of x, packed; laid out as x where x has neither gaps nor repeats."""
    room = torch.empty_like(x)
    return room if room.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
