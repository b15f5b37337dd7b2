"""Running sums over tens of thousands of tokens that are faster and more exact than one `cumsum`.

A plain `cumsum` adds all tokens one after the other. Here blocks of tokens are summed in parallel, and each
block adds the sum of the blocks before it.

Letters: `T` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128
"""Tokens of a block."""


def running_sum(x: Tensor, block: int = BLOCK) -> Tensor:
    """`Σ_{j<=i} x_j` along the second last axis.

    Args:
        x: `(…, T, N)`, real.
        block: tokens that are added one after the other.

    Returns:
        `(…, T, N)`. What stands at i depends on nothing after i, to the last bit.
    """
    tokens = x.shape[-2]
    if tokens <= block:
        return x.cumsum(-2)
    blocks = F.pad(x, (0, 0, 0, -tokens % block)).unflatten(-2, (-1, block)).cumsum(-2)
    sums = blocks + exclusive_sum(blocks[..., -1, :])[..., None, :]
    whole: Tensor = sums.flatten(-3, -2)[..., :tokens, :]
    return whole


def exclusive_sum(x: Tensor) -> Tensor:
    """`Σ_{j<i} x_j` along the second last axis, `(…, T, N)`."""
    return torch.cat((torch.zeros_like(x[..., :1, :]), x[..., :-1, :].cumsum(-2)), -2)
