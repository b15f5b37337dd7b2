"""Kernels that pass once over heads' vectors: a row is one head of one token, a program owns a few rows."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from headwise.functional.layout import padded

_NUMBERS = 4096
"""Numbers that a program holds of one tensor."""


@triton.jit
def places(ptr, stride_b, stride_h, stride_t, tokens, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Where the rows of a program begin, and their tokens; a token past the last is of no row."""
    blocks = tl.cdiv(tokens * HEADS, BLOCK)
    rows = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    at = ptr + (tl.program_id(0) // blocks).to(tl.int64) * stride_b + (rows % HEADS).to(tl.int64) * stride_h
    return at + (rows // HEADS).to(tl.int64) * stride_t, rows // HEADS


def launch(x: Tensor, parts: int = 1) -> tuple[tuple[int], dict[str, Any]]:
    """The grid for `x (B, H, T, D)`, and the sizes of a program that reads a row in so many parts."""
    batch, heads, tokens, width = x.shape
    part = padded(-(-width // parts))
    block = max(1, _NUMBERS // (parts * part))
    sizes = {"HEADS": heads, "WIDTH": width, "BLOCK": block, "BLOCK_D": part, "num_warps": 4}
    return (triton.cdiv(tokens * heads, block) * batch,), sizes
