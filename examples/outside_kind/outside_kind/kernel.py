"""Attention to nothing in one pass over the keys: forward, causal, O(T) memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES, KEYS = 64, 64


def nothing_attention(q: Tensor, k: Tensor, v: Tensor, offset: Tensor, scale: float) -> Tensor:
    """As `outside_kind.functional.nothing_attention`, causal and without a mask."""
    batch, heads, tokens, width = q.shape
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    grid = (batch * heads, triton.cdiv(tokens, QUERIES))
    _forward[grid](
        q, k, v, offset.float().contiguous(), y, *q.stride(), *k.stride(), *v.stride(), *y.stride(),
        heads, heads // k.shape[1], tokens, width, scale,
        BLOCK_M=QUERIES, BLOCK_N=KEYS, BLOCK_D=max(16, triton.next_power_of_2(width)),
    )  # fmt: skip
    return y


@triton.jit
def _forward(
    Q, K, V, C, Y,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, y_b, y_h, y_t, y_d,
    heads, group, tokens, width, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. The extra logit is where the running softmax begins."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None]
    inside = (rows < tokens)[:, None] & (d < width)[None, :]
    q = tl.load(Q + b * q_b + h * q_h + at * q_t + d[None, :] * q_d, mask=inside, other=0.0)
    c = tl.load(C + h)
    highest = tl.zeros((BLOCK_M,), tl.float32) + c
    total = tl.zeros((BLOCK_M,), tl.float32) + 1.0
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    keys_at = K + b * k_b + (h // group) * k_h
    values_at = V + b * v_b + (h // group) * v_h
    for start in range(0, tl.minimum((tl.program_id(1) + 1) * BLOCK_M, tokens), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        there = (columns < tokens)[:, None] & (d < width)[None, :]
        at = columns.to(tl.int64)[:, None]
        k = tl.load(keys_at + at * k_t + d[None, :] * k_d, mask=there, other=0.0)
        v = tl.load(values_at + at * v_t + d[None, :] * v_d, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = (columns[None, :] <= rows[:, None]) & (columns < tokens)[None, :]
        scores = tl.where(visible, scores, -float("inf"))
        rises = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - rises[:, None])
        shrinks = tl.exp(highest - rises)
        total = total * shrinks + tl.sum(weights, 1)
        y = y * shrinks[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = rises
    y = y / total[:, None]
    at = rows.to(tl.int64)[:, None]
    tl.store(Y + b * y_b + h * y_h + at * y_t + d[None, :] * y_d, y.to(Y.dtype.element_ty), mask=inside)
