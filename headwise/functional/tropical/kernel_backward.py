"""Gradients of tropical attention from its winners, in O(T·D²): no pass over pairs of tokens.

A program owns BLOCK_M queries. For each channel it reads the winners of its queries, gathers their keys,
finds again which channel won the score, and adds to dq, which it keeps. dk and dv belong to many programs,
which add integers (`fixed_unit`) to them by atomics: integers have the same sum in any order, and
floating-point numbers have not. A pass over queries for each block of keys would be O(T²·D), and after a sort
by key one program would be left with a key that wins everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.functional.layout import packed
from headwise.functional.tropical.chunked import fixed_unit
from headwise.functional.tropical.kernel import QUERIES, blocks_for


@triton.jit
def channel_of(q, k_head, stride_kt, key, ds, D: tl.constexpr):
    """Which channel wins the score of each query and its key, the lowest of equal ones."""
    k = tl.load(
        k_head + key.to(tl.int64)[:, None] * stride_kt + ds[None, :],
        mask=(key >= 0)[:, None] & (ds < D)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    _, channel = tl.max(q + k, 1, return_indices=True, return_indices_tie_break_left=True)
    return channel


@triton.jit
def share(dq, given, unit, dk_plane, key, channel, ds, D: tl.constexpr):
    """Add what each query's score is given to dq and, as integers, to dk."""
    dq += tl.where(ds[None, :] == channel[:, None], given[:, None], 0.0)
    whole = (given * unit).to(tl.int64)
    tl.atomic_add(
        dk_plane + key.to(tl.int64) * D + channel, whole, mask=(key >= 0) & (channel < D), sem="relaxed"
    )
    return dq, whole


@triton.jit
def backward_kernel(
    grad_ptr, grad_top_ptr, q_ptr, k_ptr, winner_ptr, top_winner_ptr, unit_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_gb, stride_gh, stride_gt, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    heads, group, tokens,
    TOP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK_M)
    bh = tl.program_id(0) // blocks
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    real = rows < tokens
    inside = real[:, None] & (ds < D)[None, :]
    row = rows.to(tl.int64)
    q = tl.load(
        q_ptr + b * stride_qb + h * stride_qh + row[:, None] * stride_qt + ds[None, :],
        mask=inside, other=float("-inf"),
    ).to(tl.float32)  # fmt: skip
    plane = b * (heads // group) + h // group
    unit = tl.load(unit_ptr + plane)
    k_head = k_ptr + b * stride_kb + h // group * stride_kh
    dk_plane = dk_ptr + plane * tokens * D
    dv_plane = dv_ptr + plane * tokens * D
    of_rows = tl.cast(bh, tl.int64) * tokens + row
    grad_row = grad_ptr + b * stride_gb + h * stride_gh + row * stride_gt
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for d in range(D):
        key = tl.load(winner_ptr + of_rows * D + d, mask=real, other=-1)
        given = tl.load(grad_row + d, mask=key >= 0, other=0.0)
        channel = channel_of(q, k_head, stride_kt, key, ds, D)
        dq, whole = share(dq, given, unit, dk_plane, key, channel, ds, D)
        tl.atomic_add(dv_plane + key.to(tl.int64) * D + d, whole, mask=key >= 0, sem="relaxed")
    if TOP:
        key = tl.load(top_winner_ptr + of_rows, mask=real, other=-1)
        given = tl.load(grad_top_ptr + of_rows, mask=key >= 0, other=0.0)
        channel = channel_of(q, k_head, stride_kt, key, ds, D)
        dq, whole = share(dq, given, unit, dk_plane, key, channel, ds, D)
    tl.store(dq_ptr + of_rows[:, None] * D + ds[None, :], dq, mask=inside)


def backward(
    grad: Tensor, grad_top: Tensor | None, q: Tensor, k: Tensor, winner: Tensor, top_winner: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `headwise.functional.tropical.chunked.backward`."""
    kind, shape = q.dtype, k.shape
    grad, q, k = packed(grad), packed(q), packed(k)
    batch, heads, tokens, width = q.shape
    group = heads // shape[1]
    largest = grad.unflatten(1, (-1, group)).abs().amax((2, 3, 4))
    if grad_top is not None:
        grad_top = grad_top.contiguous()
        largest = torch.maximum(largest, grad_top.unflatten(1, (-1, group)).abs().amax((2, 3)))
    unit = fixed_unit(largest, group * tokens * (width + 1))
    dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = torch.zeros((2, *shape), dtype=torch.int64, device=q.device)
    backward_kernel[(triton.cdiv(tokens, QUERIES) * batch * heads,)](
        grad, grad if grad_top is None else grad_top, q, k, winner, top_winner, unit, dq, dk, dv,
        *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], heads, group, tokens,
        TOP=grad_top is not None, D=width, **blocks_for(width),
    )  # fmt: skip
    back = unit.double()[..., None, None]
    return dq.to(kind), (dk.double() / back).to(kind), (dv.double() / back).to(kind)
