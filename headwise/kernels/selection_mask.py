"""The mask F of selective attention and its gradient, in blocks of queries; definition in
`headwise.functional.selective`.

A program owns BLOCK_N keys of one mask and walks over the queries. What query l does to a key counts
from query l + 1 on, so a tile of F at queries r needs logits at queries r - 1, and in the game of
attack and protection the protections at queries r - 2: rows are read shifted, and every scan is
inclusive. Between blocks a key carries

    done  F so far, a compensated sum of two floats         guard  the protection that is left

and within one, with x = attack - protection before it and X its running sum from the block's start,
F = done + max(0, max X - guard) and guard' = guard + (F - done) - X: numbers stay small.

The gradient runs backwards: R, the sum of F's gradients from query r on, is what an attack at r - 1
gets; in the game an attack gets the R of the first query from it on at which its key was vulnerable
(X reached its maximum and the guard), and a protection the negative of what the next attack gets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M = 64
"""Queries of a block; states of the game are kept at the start of each."""


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
    """The attack of logits, where it counts."""
    attack = tl.maximum(logits, 0.0)
    if LEAKY:
        attack = tl.where(logits > 0, logits, leak * logits)
    counts = rows[:, None] >= cols[None, :]
    if OWN:
        counts = rows[:, None] > cols[None, :]
    if BOS:
        counts = counts & (cols > 0)[None, :]
    return tl.where(counts, attack, 0.0), counts


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
def mask_kernel(
    q_ptr, k_ptr, bias_ptr, guard_q_ptr, guard_k_ptr, out_ptr, state_ptr,
    stride_qb, stride_qm, stride_qt, stride_kb, stride_km, stride_kt,
    stride_gb, stride_gm, stride_gt, stride_hb, stride_hm, stride_ht,
    masks, tokens, blocks, scale, guard_qk_scale, leak,
    guard_slope, guard_offset, guard_scale, guard_bias,
    E: tl.constexpr, GE: tl.constexpr, BIAS: tl.constexpr, GAME: tl.constexpr, GUARD: tl.constexpr,
    BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr, AFTER: tl.constexpr,
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
        x, _ = attacked(logits, rows - 1, cols, BOS, OWN, LEAKY, leak)
        if GAME:
            if GUARD:
                logits = logits_tile(
                    guard_q, guard_k, stride_gt, stride_ht, rows - 2, cols, tokens, guard_qk_scale, 0.0,
                    GE, BLOCK_M, BLOCK_N, BLOCK_E,
                )  # fmt: skip
            x -= guarded(logits, rows - 2, cols, guard_slope, guard_offset, guard_scale, guard_bias)
            tl.store(state + (start // BLOCK_M) * tokens + cols, guard, mask=cols < tokens)
            run = tl.cumsum(x, 0)
            peak = tl.associative_scan(run, 0, larger)
            damage = tl.maximum(peak - guard[None, :], 0.0)
            gained = tl.maximum(tl.max(run, 0) - guard, 0.0)
            guard += gained - tl.sum(x, 0)
        else:
            damage = tl.cumsum(x, 0)
            gained = tl.sum(x, 0)
        taken = done[None, :] + (damage + rest[None, :])
        if AFTER:
            taken = tl.maximum(taken, 0.0)
        taken = tl.where(rows[:, None] > cols[None, :], taken, 0.0)
        inside = (rows < tokens)[:, None] & (cols < tokens)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * tokens + cols[None, :], taken, mask=inside)
        total = done + gained
        back = total - done
        rest += (done - (total - back)) + (gained - back)
        done = total


@triton.jit
def mask_backward_kernel(
    q_ptr, k_ptr, bias_ptr, guard_q_ptr, guard_k_ptr, out_ptr, state_ptr, grad_ptr, d_ptr, d_guard_ptr,
    stride_qb, stride_qm, stride_qt, stride_kb, stride_km, stride_kt,
    stride_gb, stride_gm, stride_gt, stride_hb, stride_hm, stride_ht,
    masks, tokens, blocks, scale, guard_qk_scale, leak,
    guard_slope, guard_offset, guard_scale, guard_bias,
    E: tl.constexpr, GE: tl.constexpr, BIAS: tl.constexpr, GAME: tl.constexpr, GUARD: tl.constexpr,
    BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr, AFTER: tl.constexpr,
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
        if AFTER:
            grad = tl.where(tl.load(out_ptr + at, mask=inside, other=0.0) > 0, grad, 0.0)
        behind = later[None, :] + tl.cumsum(grad, 0, reverse=True)
        later += tl.sum(grad, 0)
        logits = logits_tile(
            q, k, stride_qt, stride_kt, rows - 1, cols, tokens, scale, bias, E, BLOCK_M, BLOCK_N, BLOCK_E
        )
        attack, counts = attacked(logits, rows - 1, cols, BOS, OWN, LEAKY, leak)
        d_attack = behind
        if GAME:
            protector = logits
            if GUARD:
                protector = logits_tile(
                    guard_q, guard_k, stride_gt, stride_ht, rows - 2, cols, tokens, guard_qk_scale, 0.0,
                    GE, BLOCK_M, BLOCK_N, BLOCK_E,
                )  # fmt: skip
            p = guarded(protector, rows - 2, cols, guard_slope, guard_offset, guard_scale, guard_bias)
            run = tl.cumsum(attack - p, 0)
            peak = tl.associative_scan(run, 0, larger)
            guard = tl.load(state + (start // BLOCK_M) * tokens + cols, mask=cols < tokens, other=0.0)
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
        d_logits = tl.where(logits > 0, d_attack, 0.0)
        if LEAKY:
            d_logits = tl.where(logits > 0, d_attack, leak * d_attack)
        d_logits = tl.where(counts, d_logits, 0.0)
        tl.store(
            d_ptr + at - tokens, d_logits,
            mask=(rows < tokens)[:, None] & (cols < tokens)[None, :] & (rows >= 1)[:, None],
        )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides over batch, masks and tokens; a single mask serves all."""
    return x.stride(0), 0 if x.shape[1] == 1 else x.stride(1), x.stride(2)


def _launch(kernel, q, k, bias, guard_q, guard_k, tensors, settings):
    batch, masks, tokens, width = q.shape
    game, guard = settings["game"], guard_q is not None
    guards = (guard_q, guard_k) if guard else (q, k)
    block_n = settings.get("block_n", 32)
    grid = (triton.cdiv(tokens, block_n) * batch * masks,)
    kernel[grid](
        q, k, q if bias is None else bias, *guards, *tensors,
        *_strides(q), *_strides(k), *_strides(guards[0]), *_strides(guards[1]),
        masks, tokens, triton.cdiv(tokens, BLOCK_M), settings["scale"], settings["guard_qk_scale"],
        settings["leak"], *settings["guard"],
        E=width, GE=guards[0].shape[-1], BIAS=bias is not None, GAME=game, GUARD=guard,
        BOS=settings["bos"], OWN=settings["own"], LEAKY=settings["leak"] != 0, AFTER=settings["after"],
        BLOCK_M=BLOCK_M, BLOCK_N=block_n, BLOCK_E=max(16, min(64, triton.next_power_of_2(width))),
        num_warps=settings.get("num_warps", 4), num_stages=settings.get("num_stages", 3),
    )  # fmt: skip


def _settings(
    scale: float, guard_qk_scale: float, leak: float, guard: list[float], bos: bool, own: bool, after: bool
) -> dict[str, object]:
    return {
        "scale": scale, "guard_qk_scale": guard_qk_scale, "leak": leak, "game": bool(guard),
        "guard": guard or [0.0] * 4, "bos": bos, "own": own, "after": after,
    }  # fmt: skip


@torch.library.custom_op("headwise::selection_mask", mutates_args=())
def selection_mask(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    guard_q: Tensor | None,
    guard_k: Tensor | None,
    scale: float,
    guard_qk_scale: float,
    leak: float,
    guard: list[float],
    bos: bool,
    own: bool,
    after: bool,
) -> tuple[Tensor, Tensor]:
    """F and the states its gradient needs.

    Args:
        q: selection queries `(B, M, T, E)`, the last stride 1.
        k: selection keys `(B, M or 1, T, E)`.
        bias: of the logits, `(M,)`.
        guard_q, guard_k: queries and keys of the protecting logits, `(B, M or 1, T, E')`; the selection
            logits themselves protect where both are the same, none where both are absent.
        guard: slope, offset, scale and bias of the protection `relu(scale · relu(slope · logits +
            offset) + bias)`; empty for the plain running sum.
        bos, own: whether the first and the own key are protected.
        after: another ReLU on F.

    Returns:
        F `(B, M, T, T)` float32, undefined above the diagonal's blocks; states `(B, M, blocks, T)`.
    """
    batch, masks, tokens, _ = q.shape
    out = q.new_empty((batch, masks, tokens, tokens), dtype=torch.float32)
    blocks = triton.cdiv(tokens, BLOCK_M) if guard else 0
    state = q.new_empty((batch, masks, blocks, tokens), dtype=torch.float32)
    settings = _settings(scale, guard_qk_scale, leak, guard, bos, own, after)
    _launch(mask_kernel, q, k, bias, guard_q, guard_k, (out, state), settings)
    return out, state


@selection_mask.register_fake
def _(q, k, bias, guard_q, guard_k, scale, guard_qk_scale, leak, guard, bos, own, after):
    batch, masks, tokens, _ = q.shape
    blocks = -(-tokens // BLOCK_M) if guard else 0
    return (
        q.new_empty((batch, masks, tokens, tokens), dtype=torch.float32),
        q.new_empty((batch, masks, blocks, tokens), dtype=torch.float32),
    )


@torch.library.custom_op("headwise::selection_mask_backward", mutates_args=())
def selection_mask_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    guard_q: Tensor | None,
    guard_k: Tensor | None,
    out: Tensor,
    state: Tensor,
    scale: float,
    guard_qk_scale: float,
    leak: float,
    guard: list[float],
    bos: bool,
    own: bool,
    after: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the selection logits and of the protecting logits, each `(B, M, T, T)` in q's dtype."""
    d_logits = torch.zeros_like(grad, dtype=q.dtype)
    d_guard = torch.zeros_like(grad, dtype=q.dtype) if guard_q is not None else q.new_empty(0)
    settings = _settings(scale, guard_qk_scale, leak, guard, bos, own, after)
    tensors = (out, state, grad.contiguous(), d_logits, d_guard)
    _launch(mask_backward_kernel, q, k, bias, guard_q, guard_k, tensors, settings)
    return d_logits, d_guard


@selection_mask_backward.register_fake
def _(grad, q, k, bias, guard_q, guard_k, out, state, *settings):
    d_guard = torch.empty_like(grad, dtype=q.dtype) if guard_q is not None else q.new_empty(0)
    return torch.empty_like(grad, dtype=q.dtype), d_guard


def _save(ctx, inputs, output):
    q, k, bias, guard_q, guard_k, *settings = inputs
    out, state = output
    ctx.mark_non_differentiable(state)
    ctx.settings = settings
    ctx.save_for_backward(q, k, bias, guard_q, guard_k, out if settings[-1] else out.new_empty(0), state)


def _backward(ctx, grad, _):
    q, k, bias, guard_q, guard_k, out, state = ctx.saved_tensors
    scale, guard_qk_scale = ctx.settings[:2]
    d_logits, d_guard = selection_mask_backward(
        grad, q, k, bias, guard_q, guard_k, out, state, *ctx.settings
    )
    dq, dk = _of_product(d_logits, q, k, scale)
    d_bias = None if bias is None else d_logits.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    d_guard_q = d_guard_k = None
    if guard_q is not None:
        d_guard_q, d_guard_k = _of_product(d_guard, guard_q, guard_k, guard_qk_scale)
    return dq, dk, d_bias, d_guard_q, d_guard_k, *[None] * len(ctx.settings)


def _of_product(grad: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of q and k of those of `scale · q k^T`, summed where masks share them."""
    dq = (grad @ k) * scale
    dk = (grad.transpose(-2, -1) @ q) * scale
    dq = dq.sum(1, keepdim=True) if q.shape[1] == 1 else dq
    return dq, dk.sum(1, keepdim=True) if k.shape[1] == 1 else dk


selection_mask.register_autograd(_backward, setup_context=_save)
