"""What the kernels of the selection mask share: logits of a tile, and the attacks they are."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_M = 64
"""Queries of a block."""


@triton.jit
def place(blocks, columns):
    """Block of queries, block of keys and mask (int64) of this program.

    In one dimension of the grid, for the others hold no more than 65,535 programs.
    """
    program = tl.program_id(0)
    return program % blocks, program // blocks % columns, (program // blocks // columns).to(tl.int64)


@triton.jit
def logits_tile(
    q_ptr, k_ptr, stride_qt, stride_kt, rows, cols, tokens, scale, bias,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`scale · q·k + bias` of rows that may be -1, -2 (nobody: 0 queries) and cols."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    here = ((rows >= 0) & (rows < tokens))[:, None]
    there = (cols < tokens)[None, :]
    for start in range(0, E, BLOCK_E):
        es = start + tl.arange(0, BLOCK_E)
        q = tl.load(
            q_ptr + rows.to(tl.int64)[:, None] * stride_qt + es[None, :],
            mask=here & (es < E)[None, :], other=0.0,
        )  # fmt: skip
        k = tl.load(
            k_ptr + cols.to(tl.int64)[None, :] * stride_kt + es[:, None],
            mask=there & (es < E)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(q, k, total, input_precision="ieee")
    return total * scale + bias


@triton.jit
def attacked(logits, rows, cols, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr, leak):
    """The attack of logits, where it counts; NaN takes nothing: sums by products would spread it to
    earlier queries."""
    attack = tl.maximum(logits, 0.0)
    if LEAKY:
        attack = tl.where(logits > 0, logits, tl.where(logits <= 0, leak * logits, 0.0))
    counts = rows[:, None] >= cols[None, :]
    if OWN:
        counts = rows[:, None] > cols[None, :]
    if BOS:
        counts = counts & (cols > 0)[None, :]
    return tl.where(counts, attack, 0.0), counts


@triton.jit
def attack_tile(
    q, k, bias_ptr, stride_qt, stride_kt, rows, cols, tokens, scale, leak,
    E: tl.constexpr, BIAS: tl.constexpr, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What rows do to keys, the logits it comes from, and where it counts."""
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr).to(tl.float32)
    logits = logits_tile(
        q, k, stride_qt, stride_kt, rows, cols, tokens, scale, bias, E, BLOCK_M, BLOCK_N, BLOCK_E
    )  # fmt: skip
    attack, counts = attacked(logits, rows, cols, BOS, OWN, LEAKY, leak)
    return attack, logits, counts & (rows < tokens)[:, None]


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides over batch, masks and tokens; a single mask serves all."""
    return x.stride(0), 0 if x.shape[1] == 1 else x.stride(1), x.stride(2)


def block_of(width: int) -> int:
    """Coordinates of a product that are read at a time."""
    return max(16, min(64, triton.next_power_of_2(width)))
