"""When each key leaves a context budget: one program walks over the queries of one F.

Definition: `headwise.functional.budget.turns`. A walk over T queries is T dependent steps; launched one by
one from Python they cost a hundred times as much as a program that keeps what has left in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def turns_kernel(taken_ptr, left_ptr, tokens, keys, first, BLOCK: tl.constexpr):
    """The query at which each key of one F leaves."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    left = tl.zeros((BLOCK,), tl.int32) + tokens
    for query in range(keys, tokens):
        held = (cols >= first) & (cols < query) & (left == tokens)
        taken = tl.load(taken_ptr + (row * tokens + query) * tokens + cols, mask=held, other=float("-inf"))
        worst = tl.argmax(taken.to(tl.float32), 0, tie_break_left=True)
        left = tl.where(cols == worst, query, left)
    tl.store(left_ptr + row * tokens + cols, left, mask=cols < tokens)


def turns(taken: Tensor, keys: int, first: int) -> Tensor:
    """The query at which each key leaves, `(…, T)` int64, of F `(…, T, T)`; keys below `first` stay."""
    taken = taken.contiguous()
    tokens = taken.shape[-1]
    left = torch.empty(taken.shape[:-1], dtype=torch.int32, device=taken.device)
    block = max(16, triton.next_power_of_2(tokens))
    turns_kernel[(left.numel() // tokens,)](
        taken, left, tokens, keys, first, BLOCK=block, num_warps=max(1, min(16, block // 512))
    )
    return left.long()
