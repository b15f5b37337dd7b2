"""F as the game of attack and protection, and its gradient; the definition is in scan.py.

A program owns BLOCK_N keys of one mask and walks over the queries. What query l does to a key counts from
query l + 1 on, so a tile of F at queries r needs attacks at queries r - 1 and protections at queries r - 2:
rows are read shifted, and every scan is inclusive. Between blocks a key carries

    done  F so far, a compensated sum of two floats         guard  the protection that is left

and within one, with x = attack - protection before it and X its running sum from the block's start,
F = done + max(0, max X - guard) and guard' = guard + (F - done) - X: numbers stay small.

The gradient runs backwards: with R the sum of F's gradients from query r on, an attack gets R of the first
query from it on at which its key was vulnerable (X reached its maximum and the guard), and a protection
the negative of what the next attack gets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.functional.selective.kernel_tiles import BLOCK_M, attacked, block_of, logits_tile, strides


@triton.jit
def guarded(logits, rows, cols, guard_slope, guard_offset, guard_scale, guard_bias):
    """The protection `relu(scale · relu(slope · logits + offset) + bias)`, from its own query on."""
    p = tl.maximum(guard_slope * logits + guard_offset, 0.0)
    p = tl.maximum(guard_scale * p + guard_bias, 0.0)
    return tl.where((rows[:, None] >= cols[None, :]) & (rows >= 0)[:, None], p, 0.0)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def latest(flag_a, value_a, flag_b, value_b):
    """The value of the last flagged entry of a scan."""
    return flag_a | flag_b, tl.where(flag_b > 0, value_b, value_a)


@triton.jit
def game_kernel(
    q_ptr, k_ptr, bias_ptr, guard_q_ptr, guard_k_ptr, out_ptr, state_ptr,
    stride_qb, stride_qm, stride_qt, stride_kb, stride_km, stride_kt,
    stride_gb, stride_gm, stride_gt, stride_hb, stride_hm, stride_ht,
    masks, tokens, blocks, scale, guard_qk_scale,
    guard_slope, guard_offset, guard_scale, guard_bias,
    E: tl.constexpr, GE: tl.constexpr, BIAS: tl.constexpr, GUARD: tl.constexpr,
    BOS: tl.constexpr, OWN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    bm = tl.program_id(0) % (tl.num_programs(0) // tl.cdiv(tokens, BLOCK_N))
    column = tl.program_id(0) // (tl.num_programs(0) // tl.cdiv(tokens, BLOCK_N))
    b = (bm // masks).to(tl.int64)
    m = (bm % masks).to(tl.int64)
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    q = q_ptr + b * stride_qb + m * stride_qm
    k = k_ptr + b * stride_kb + m * stride_km
    guard_q = guard_q_ptr + b * stride_gb + m * stride_gm
    guard_k = guard_k_ptr + b * stride_hb + m * stride_hm
    out = out_ptr + tl.cast(bm, tl.int64) * tokens * tokens
    state = state_ptr + tl.cast(bm, tl.int64) * blocks * tokens
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + m).to(tl.float32)
    local = tl.arange(0, BLOCK_M)
    done = tl.zeros((BLOCK_N,), tl.float32)
    rest = tl.zeros((BLOCK_N,), tl.float32)
    guard = tl.zeros((BLOCK_N,), tl.float32)
    first = (column * BLOCK_N) // BLOCK_M * BLOCK_M
    for start in range(first, tokens, BLOCK_M):
        rows = start + local
        logits = logits_tile(
            q, k, stride_qt, stride_kt, rows - 1, cols, tokens, scale, bias, E, BLOCK_M, BLOCK_N, BLOCK_E
        )
        x, _ = attacked(logits, rows - 1, cols, BOS, OWN, False, 0.0)
        if GUARD:
            logits = logits_tile(
                guard_q, guard_k, stride_gt, stride_ht, rows - 2, cols, tokens, guard_qk_scale, 0.0,
                GE, BLOCK_M, BLOCK_N, BLOCK_E,
            )  # fmt: skip
        x -= guarded(logits, rows - 2, cols, guard_slope, guard_offset, guard_scale, guard_bias)
        tl.store(state + tl.cast(start // BLOCK_M, tl.int64) * tokens + cols, guard, mask=cols < tokens)
        run = tl.cumsum(x, 0)
        peak = tl.associative_scan(run, 0, larger)
        damage = tl.maximum(peak - guard[None, :], 0.0)
        gained = tl.maximum(tl.max(run, 0) - guard, 0.0)
        guard += gained - tl.sum(x, 0)
        taken = done[None, :] + (damage + rest[None, :])
        taken = tl.where(rows[:, None] > cols[None, :], taken, 0.0)
        inside = (rows < tokens)[:, None] & (cols < tokens)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * tokens + cols[None, :], taken, mask=inside)
        total = done + gained
        back = total - done
        rest += (done - (total - back)) + (gained - back)
        done = total


@triton.jit
def game_backward_kernel(
    q_ptr, k_ptr, bias_ptr, guard_q_ptr, guard_k_ptr, state_ptr, grad_ptr, d_ptr, d_guard_ptr,
    stride_qb, stride_qm, stride_qt, stride_kb, stride_km, stride_kt,
    stride_gb, stride_gm, stride_gt, stride_hb, stride_hm, stride_ht,
    masks, tokens, blocks, scale, guard_qk_scale,
    guard_slope, guard_offset, guard_scale, guard_bias,
    E: tl.constexpr, GE: tl.constexpr, BIAS: tl.constexpr, GUARD: tl.constexpr,
    BOS: tl.constexpr, OWN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    bm = tl.program_id(0) % (tl.num_programs(0) // tl.cdiv(tokens, BLOCK_N))
    column = tl.program_id(0) // (tl.num_programs(0) // tl.cdiv(tokens, BLOCK_N))
    b = (bm // masks).to(tl.int64)
    m = (bm % masks).to(tl.int64)
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    q = q_ptr + b * stride_qb + m * stride_qm
    k = k_ptr + b * stride_kb + m * stride_km
    guard_q = guard_q_ptr + b * stride_gb + m * stride_gm
    guard_k = guard_k_ptr + b * stride_hb + m * stride_hm
    square = tl.cast(bm, tl.int64) * tokens * tokens
    state = state_ptr + tl.cast(bm, tl.int64) * blocks * tokens
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + m).to(tl.float32)
    local = tl.arange(0, BLOCK_M)
    later = tl.zeros((BLOCK_N,), tl.float32)  # R of the queries after this block
    heir = tl.zeros((BLOCK_N,), tl.float32)  # R at the first vulnerable turn after this block
    first = (column * BLOCK_N) // BLOCK_M
    for index in range(blocks - first):
        start = (blocks - 1 - index) * BLOCK_M
        rows = start + local
        inside = ((rows < tokens)[:, None] & (cols < tokens)[None, :]) & (rows[:, None] > cols[None, :])
        at = square + rows.to(tl.int64)[:, None] * tokens + cols[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        later += tl.sum(grad, 0)
        behind = later[None, :] - tl.cumsum(grad, 0) + grad  # a scan from behind would cost far more
        logits = logits_tile(
            q, k, stride_qt, stride_kt, rows - 1, cols, tokens, scale, bias, E, BLOCK_M, BLOCK_N, BLOCK_E
        )
        attack, counts = attacked(logits, rows - 1, cols, BOS, OWN, False, 0.0)
        protector = logits
        if GUARD:
            protector = logits_tile(
                guard_q, guard_k, stride_gt, stride_ht, rows - 2, cols, tokens, guard_qk_scale, 0.0,
                GE, BLOCK_M, BLOCK_N, BLOCK_E,
            )  # fmt: skip
        p = guarded(protector, rows - 2, cols, guard_slope, guard_offset, guard_scale, guard_bias)
        run = tl.cumsum(attack - p, 0)
        peak = tl.associative_scan(run, 0, larger)
        guard = tl.load(
            state + tl.cast(start // BLOCK_M, tl.int64) * tokens + cols, mask=cols < tokens, other=0.0
        )
        vulnerable = ((run >= guard[None, :]) & (run >= peak)).to(tl.int32)
        found, d_attack = tl.associative_scan((vulnerable, behind), 0, latest, reverse=True)
        d_attack = tl.where(found > 0, d_attack, heir[None, :])
        heir = tl.sum(tl.where(local[:, None] == 0, d_attack, 0.0), 0)
        if GUARD:
            slope = guard_slope * guard_scale
            inner = guard_slope * protector + guard_offset
            active = (inner > 0) & (guard_scale * inner + guard_bias > 0)
            active = active & ((rows - 2)[:, None] >= cols[None, :])
            tl.store(
                d_guard_ptr + at - 2 * tokens, tl.where(active, -slope * d_attack, 0.0),
                mask=(rows < tokens)[:, None] & (cols < tokens)[None, :] & (rows >= 2)[:, None],
            )  # fmt: skip
        d_logits = tl.where((logits > 0) & counts, d_attack, 0.0)
        tl.store(
            d_ptr + at - tokens, d_logits,
            mask=(rows < tokens)[:, None] & (cols < tokens)[None, :] & (rows >= 1)[:, None],
        )  # fmt: skip


LAUNCH = {"BLOCK_N": 32, "num_warps": 4, "num_stages": 3}


def _launch(kernel, q, k, bias, guards, tensors, scale, guard_qk_scale, guard, bos, own):
    batch, masks, tokens, width = q.shape
    own_guards = guards if guards[0] is not None else (q, k)
    kernel[(triton.cdiv(tokens, LAUNCH["BLOCK_N"]) * batch * masks,)](
        q, k, q if bias is None else bias, *own_guards, *tensors,
        *strides(q), *strides(k), *strides(own_guards[0]), *strides(own_guards[1]),
        masks, tokens, triton.cdiv(tokens, BLOCK_M), scale, guard_qk_scale, *guard,
        E=width, GE=own_guards[0].shape[-1], BIAS=bias is not None, GUARD=guards[0] is not None,
        BOS=bos, OWN=own, BLOCK_M=BLOCK_M, BLOCK_E=block_of(width), **LAUNCH,
    )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    guards: tuple[Tensor | None, Tensor | None],
    scale: float,
    guard_qk_scale: float,
    guard: list[float],
    bos: bool,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """F, and the protection left at the start of each block; arguments as `selection_mask` takes them."""
    batch, masks, tokens, _ = q.shape
    out = q.new_empty((batch, masks, tokens, tokens), dtype=torch.float32)
    state = q.new_empty((batch, masks, triton.cdiv(tokens, BLOCK_M), tokens), dtype=torch.float32)
    _launch(game_kernel, q, k, bias, guards, (out, state), scale, guard_qk_scale, guard, bos, own)
    return out, state


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    guards: tuple[Tensor | None, Tensor | None],
    state: Tensor,
    scale: float,
    guard_qk_scale: float,
    guard: list[float],
    bos: bool,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the selection logits and of the protecting logits, `(B, M, T, T)` in q's dtype."""
    d_logits = torch.zeros_like(grad, dtype=q.dtype)
    d_guard = torch.zeros_like(d_logits) if guards[0] is not None else q.new_empty(0)
    tensors = (state, grad, d_logits, d_guard)
    _launch(game_backward_kernel, q, k, bias, guards, tensors, scale, guard_qk_scale, guard, bos, own)
    return d_logits, d_guard
