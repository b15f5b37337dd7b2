"""The memory layout that every kernel needs: contiguous vectors, and rows that are not too far apart."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 16
"""A tensor's address must be a multiple of so many bytes, and each stride a multiple of so many elements.

Triton compiles a second variant of a kernel for arguments that are not multiples of 16. For 16-bit types this
variant reads tiles element by element and runs out of registers. On Triton 3.6 it returned wrong values, and
it was running when a test ended with an illegal memory access. It is therefore never used.
"""

FARTHEST = 1 << 24
"""The largest stride of rows that kernels take: 128 rows of a tile then span at most 2^31 elements."""

REACH = 1 << 31
"""A tensor with gaps is copied if its first and last elements lie at least so many elements apart."""


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


def room_by_token(x: Tensor) -> Tensor:
    """Uninitialised memory of the shape of `x (B, H, T, D)`, laid out `(B, T, H, D)`."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
