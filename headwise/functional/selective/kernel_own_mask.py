"""Selective attention whose heads have a mask each: F is made tile by tile and never kept.

    y_i = Σ_j softmax_j(scale · q_i·k_j - F[i,j]) v_j,   F[i,j] = Σ_{l<i} act(L[l,j])

Tiles lie keys by queries, so that the running sum over queries stays within a few neighbouring lanes.
Only F at the start of each block of queries is in memory, `(B, H, T / BLOCK, T)`. What query l does to a
key counts from query l + 1 on: a tile at queries r reads selection queries r - 1.

The gradient of L[r-1,j] is R[r,j], the sum over queries i >= r of F's gradient there, which is minus that
of the logits. One pass walks over queries from the last to the first for each block of keys: R is at
hand, and is left at the end of each block for the pass over keys for each block of queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.functional.layout import packed
from headwise.functional.selective.kernel_masked import (
    LOG2E,
    delta_of,
    gradients_like,
    output_like,
    rows_of,
)
from headwise.functional.selective.kernel_sums import along_rows

BLOCK = 32
"""Queries between two states of F in memory."""

WIDEST = 128
"""Of selection queries."""


@triton.jit
def shifted_rows(ptr, stride, rows, tokens, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Selection queries r - 1, `(rows, BLOCK_E)`, zeros where there is none."""
    es = tl.arange(0, BLOCK_E)
    return tl.load(
        ptr + (rows - 1).to(tl.int64)[:, None] * stride + es[None, :],
        mask=((rows > 0) & (rows <= tokens))[:, None] & (es < E)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def biases(bias_ptr, h, cols, BIAS: tl.constexpr, BOS: tl.constexpr, LEAKY: tl.constexpr):
    """Bias of the selection logits by key, in base 2; -inf where a key cannot be attacked."""
    bias = tl.zeros_like(cols).to(tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + h).to(tl.float32) * LOG2E
    if BOS and not LEAKY:
        bias = tl.where(cols > 0, bias, float("-inf"))
    return bias


@triton.jit
def attacks(
    select_q, select_k, rows, cols, unit, bias, leak,
    BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """What queries r - 1 do to keys, `(cols, rows)`, in base 2, and its slope; all count but at an EDGE."""
    logits = tl.dot(select_k, tl.trans(select_q), input_precision="ieee") * unit + bias[:, None]
    slope = tl.where(logits > 0, 1.0, leak)
    attack = tl.maximum(logits, 0.0)
    if LEAKY:  # NaN takes nothing: sums by products would spread it to earlier queries
        attack = tl.where(logits > 0, logits, tl.where(logits <= 0, leak * logits, 0.0))
    if EDGE:
        before = (rows - 1)[None, :]
        counts = before > cols[:, None] if OWN else before >= cols[:, None]
        attack, slope = tl.where(counts, attack, 0.0), tl.where(counts, slope, 0.0)
    if BOS and LEAKY:
        attack, slope = tl.where((cols > 0)[:, None], attack, 0.0), tl.where((cols > 0)[:, None], slope, 0.0)
    return attack, slope


@triton.jit
def made(done, attack, AFTER: tl.constexpr, EXACT: tl.constexpr):
    """F of a tile, of F before its block and the attacks within, in base 2."""
    taken = done[:, None] + along_rows(attack, False, EXACT)
    if AFTER:
        taken = tl.maximum(taken, 0.0)
    return taken


@triton.jit
def states_kernel(
    sq_ptr, sk_ptr, bias_ptr, done_ptr,
    stride_sqb, stride_sqh, stride_sqt, stride_skb, stride_skh, stride_skt,
    heads, tokens, blocks, select_scale, leak, BIAS: tl.constexpr, BOS: tl.constexpr, OWN: tl.constexpr,
    LEAKY: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """F at the start of each block of queries, before its first shifted row."""
    columns = tl.cdiv(tokens, BLOCK_N)
    bh = tl.program_id(0) % (tl.num_programs(0) // columns)
    start_n = tl.program_id(0) // (tl.num_programs(0) // columns) * BLOCK_N
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    cols = start_n + tl.arange(0, BLOCK_N)
    select_k = rows_of(sk_ptr + b * stride_skb + h * stride_skh, stride_skt, cols, tokens, E, BLOCK_E)
    select_q_head = sq_ptr + b * stride_sqb + h * stride_sqh
    bias = biases(bias_ptr, h, cols, BIAS, BOS, LEAKY)
    done = tl.zeros((BLOCK_N,), tl.float32)
    rest = tl.zeros((BLOCK_N,), tl.float32)
    states = done_ptr + tl.cast(bh, tl.int64) * blocks * tokens + cols
    for block in range(start_n // BLOCK_M, blocks):
        tl.store(states + tl.cast(block, tl.int64) * tokens, done + rest, mask=cols < tokens)
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        select_q = shifted_rows(select_q_head, stride_sqt, rows, tokens, E, BLOCK_E)
        attack, _ = attacks(
            select_q, select_k, rows, cols, select_scale * LOG2E, bias, leak, BOS, OWN, LEAKY, True
        )  # fmt: skip
        gained = tl.sum(attack, 1)
        total = done + gained
        back = total - done
        rest += (done - (total - back)) + (gained - back)
        done = total


@triton.jit
def absorb(
    acc, top, total, q, select_q, k_head, v_head, select_k_head, states, bias_ptr, stride_kt, stride_vt,
    stride_skt, rows, cols, tokens, h, scale, select_scale, leak,
    BIAS: tl.constexpr, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr, AFTER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add a tile to the running softmax of a block of queries; `total` is kept by key of a tile."""
    k = rows_of(k_head, stride_kt, cols, tokens, D, BLOCK_D)
    select_k = rows_of(select_k_head, stride_skt, cols, tokens, E, BLOCK_E)
    done = tl.load(states + cols, mask=cols < tokens, other=0.0)
    bias = biases(bias_ptr, h, cols, BIAS, BOS, LEAKY)
    attack, _ = attacks(
        select_q, select_k, rows, cols, select_scale * LOG2E, bias, leak, BOS, OWN, LEAKY, EDGE
    )  # fmt: skip
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
    s = s - made(done, attack, AFTER, q.dtype == tl.float32)
    if EDGE:
        s = tl.where(rows[None, :] >= cols[:, None], s, float("-inf"))
    highest = tl.maximum(top, tl.max(s, 0))
    shrink = tl.exp2(top - highest)
    p = tl.exp2(s - highest[None, :])
    v = rows_of(v_head, stride_vt, cols, tokens, D, BLOCK_D)
    acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * shrink[None, :], input_precision="ieee")
    return acc, highest, total * shrink[None, :] + p


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, sq_ptr, sk_ptr, bias_ptr, done_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_sqb, stride_sqh, stride_sqt, stride_skb, stride_skh, stride_skt, stride_ob, stride_oh, stride_ot,
    batch, heads, kv_heads, tokens, blocks, scale, select_scale, leak,
    BIAS: tl.constexpr, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr, AFTER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = ((tl.program_id(0) // heads) % batch).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) // (heads * batch)
    kv = h // (heads // kv_heads)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = rows_of(q_ptr + b * stride_qb + h * stride_qh, stride_qt, rows, tokens, D, BLOCK_D)
    select_q = shifted_rows(
        sq_ptr + b * stride_sqb + h * stride_sqh, stride_sqt, rows, tokens, E, BLOCK_E
    )  # fmt: skip
    k_head = k_ptr + b * stride_kb + kv * stride_kh
    v_head = v_ptr + b * stride_vb + kv * stride_vh
    select_k_head = sk_ptr + b * stride_skb + h * stride_skh
    states = done_ptr + ((b * heads + h) * blocks + block) * tokens
    acc = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    top = tl.zeros((BLOCK_M,), tl.float32) - 1e30
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    inner = tl.maximum(block * BLOCK_M - 1, 0) // BLOCK_N * BLOCK_N
    stop = tl.minimum((block + 1) * BLOCK_M, tokens)
    for edge in tl.static_range(2):  # tiles where every query acts on every key, then the others
        for start_n in range(inner if edge else 0, stop if edge else inner, BLOCK_N):
            acc, top, total = absorb(
                acc, top, total, q, select_q, k_head, v_head, select_k_head, states, bias_ptr,
                stride_kt, stride_vt, stride_skt, rows, start_n + tl.arange(0, BLOCK_N), tokens, h,
                scale, select_scale, leak, BIAS, BOS, OWN, LEAKY, AFTER, D, BLOCK_D, E, BLOCK_E, edge,
            )  # fmt: skip
    total = tl.sum(total, 0)
    here = rows < tokens
    ds = tl.arange(0, BLOCK_D)
    at = b * stride_ob + h * stride_oh + rows.to(tl.int64)[None, :] * stride_ot + ds[:, None]
    tl.store(out_ptr + at, acc / total[None, :], mask=here[None, :] & (ds < D)[:, None])
    tl.store(lse_ptr + (b * heads + h) * tokens + rows, top + tl.log2(total), mask=here)


@triton.jit
def slopes(
    q, k, v, grad, select_q, select_k, done, later, lse, delta, rows, cols, unit, select_unit, bias,
    leak, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr, AFTER: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Of a tile: p, the gradients of the logits and of the selection logits, and R before its block."""
    attack, slope = attacks(
        select_q, select_k, rows, cols, select_unit, bias, leak, BOS, OWN, LEAKY, EDGE
    )  # fmt: skip
    taken = made(done, attack, AFTER, q.dtype == tl.float32)
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * unit - taken
    p = tl.exp2(s - lse[None, :])
    if EDGE:
        p = tl.where(rows[None, :] >= cols[:, None], p, 0.0)
    d_logits = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
    d_taken = d_logits
    if AFTER:
        d_taken = tl.where(taken > 0, d_taken, 0.0)
    behind = later[:, None] - along_rows(d_taken, True, q.dtype == tl.float32)
    d_select = behind * slope
    if EDGE:
        d_select = tl.where(slope != 0, d_select, 0.0)  # `later` is unknown where no query sees a key
    return p, d_logits, d_select, later - tl.sum(d_taken, 1)


@triton.jit
def gather(
    dk, dv, dsk, d_bias, later, k, v, select_k, bias, q_head, grad_head, select_q_head, done_ptr, later_ptr,
    lse_ptr, delta_ptr, stride_qt, stride_gt, stride_sqt, block, cols, tokens, unit, select_unit, leak,
    BIAS: tl.constexpr, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr, AFTER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Add what a block of queries says to the gradients of a block of keys; leaves R behind."""
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = rows < tokens
    tl.store(later_ptr + tl.cast(block, tl.int64) * tokens, later, mask=cols < tokens)
    q = rows_of(q_head, stride_qt, rows, tokens, D, BLOCK_D)
    grad = rows_of(grad_head, stride_gt, rows, tokens, D, BLOCK_D)
    select_q = shifted_rows(select_q_head, stride_sqt, rows, tokens, E, BLOCK_E)
    done = tl.load(done_ptr + tl.cast(block, tl.int64) * tokens, mask=cols < tokens, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=here, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=here, other=0.0)
    p, d_logits, d_select, later = slopes(
        q, k, v, grad, select_q, select_k, done, later, lse, delta, rows, cols, unit, select_unit, bias,
        leak, BOS, OWN, LEAKY, AFTER, EDGE,
    )  # fmt: skip
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    dk = tl.dot(d_logits.to(q.dtype), q, dk, input_precision="ieee")
    dsk = tl.dot(d_select.to(select_q.dtype), select_q, dsk, input_precision="ieee")
    if BIAS:
        d_bias += tl.sum(d_select, 1)
    return dk, dv, dsk, d_bias, later


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, sq_ptr, sk_ptr, bias_ptr, done_ptr, later_ptr, grad_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, dsk_ptr, d_bias_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_sqb, stride_sqh, stride_sqt, stride_skb, stride_skh, stride_skt, stride_gb, stride_gh, stride_gt,
    stride_db, stride_dh, stride_dt, batch, heads, kv_heads, tokens, blocks, scale, select_scale, leak,
    GROUP: tl.constexpr, BIAS: tl.constexpr, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr,
    AFTER: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values, and each head's of their selection keys; leaves R behind."""
    kv = (tl.program_id(0) % kv_heads).to(tl.int64)
    b = ((tl.program_id(0) // kv_heads) % batch).to(tl.int64)
    column = tl.program_id(0) // (kv_heads * batch)
    start_n = column * BLOCK_N
    cols = start_n + tl.arange(0, BLOCK_N)
    k = rows_of(k_ptr + b * stride_kb + kv * stride_kh, stride_kt, cols, tokens, D, BLOCK_D)
    v = rows_of(v_ptr + b * stride_vb + kv * stride_vh, stride_vt, cols, tokens, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    ds = tl.arange(0, BLOCK_D)
    es = tl.arange(0, BLOCK_E)
    first = start_n // BLOCK_M
    for member in range(GROUP):
        h = kv * GROUP + member
        bias = biases(bias_ptr, h, cols, BIAS, BOS, LEAKY)
        q_head = q_ptr + b * stride_qb + h * stride_qh
        grad_head = grad_ptr + b * stride_gb + h * stride_gh
        select_q_head = sq_ptr + b * stride_sqb + h * stride_sqh
        select_k = rows_of(sk_ptr + b * stride_skb + h * stride_skh, stride_skt, cols, tokens, E, BLOCK_E)
        per_query = (b * heads + h) * tokens
        states = (b * heads + h) * blocks * tokens + cols
        dsk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        d_bias = tl.zeros((BLOCK_N,), tl.float32)
        later = tl.zeros((BLOCK_N,), tl.float32)
        last = tl.minimum(first + BLOCK_N // BLOCK_M + 1, blocks)
        for edge in tl.static_range(2):
            for index in range(blocks - last if edge else 0, blocks - first if edge else blocks - last):
                dk, dv, dsk, d_bias, later = gather(
                    dk, dv, dsk, d_bias, later, k, v, select_k, bias, q_head, grad_head, select_q_head,
                    done_ptr + states, later_ptr + states, lse_ptr + per_query, delta_ptr + per_query,
                    stride_qt, stride_gt, stride_sqt, blocks - 1 - index, cols, tokens, scale * LOG2E,
                    select_scale * LOG2E, leak, BIAS, BOS, OWN, LEAKY, AFTER,
                    D, BLOCK_D, E, BLOCK_E, BLOCK_M, edge,
                )  # fmt: skip
        at = ((b * heads + h) * tokens + cols).to(tl.int64)[:, None] * E + es[None, :]
        inside = (cols < tokens)[:, None] & (es < E)[None, :]
        tl.store(dsk_ptr + at, dsk * select_scale, mask=inside)
        if BIAS:
            tl.store(d_bias_ptr + per_query + cols, d_bias, mask=cols < tokens)
    at = b * stride_db + kv * stride_dh + cols.to(tl.int64)[:, None] * stride_dt + ds[None, :]
    inside = (cols < tokens)[:, None] & (ds < D)[None, :]
    tl.store(dk_ptr + at, dk * scale, mask=inside)
    tl.store(dv_ptr + at, dv, mask=inside)


@triton.jit
def spread(
    dq, dsq, q, grad, select_q, lse, delta, k_head, v_head, select_k_head, done_ptr, later_ptr, bias_ptr,
    stride_kt, stride_vt, stride_skt, rows, cols, tokens, h, unit, select_unit, leak,
    BIAS: tl.constexpr, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr, AFTER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add what a block of keys says to the gradients of a block of queries."""
    k = rows_of(k_head, stride_kt, cols, tokens, D, BLOCK_D)
    v = rows_of(v_head, stride_vt, cols, tokens, D, BLOCK_D)
    select_k = rows_of(select_k_head, stride_skt, cols, tokens, E, BLOCK_E)
    done = tl.load(done_ptr + cols, mask=cols < tokens, other=0.0)
    later = tl.load(later_ptr + cols, mask=cols < tokens, other=0.0)
    bias = biases(bias_ptr, h, cols, BIAS, BOS, LEAKY)
    _, d_logits, d_select, _ = slopes(
        q, k, v, grad, select_q, select_k, done, later, lse, delta, rows, cols, unit, select_unit, bias,
        leak, BOS, OWN, LEAKY, AFTER, EDGE,
    )  # fmt: skip
    dq = tl.dot(tl.trans(k), d_logits.to(k.dtype), dq, input_precision="ieee")
    dsq = tl.dot(tl.trans(select_k), d_select.to(select_k.dtype), dsq, input_precision="ieee")
    return dq, dsq


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, sq_ptr, sk_ptr, bias_ptr, done_ptr, later_ptr, grad_ptr, lse_ptr, delta_ptr,
    dq_ptr, dsq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_sqb, stride_sqh, stride_sqt, stride_skb, stride_skh, stride_skt, stride_gb, stride_gh, stride_gt,
    stride_db, stride_dh, stride_dt, batch, heads, kv_heads, tokens, blocks, scale, select_scale, leak,
    BIAS: tl.constexpr, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr, AFTER: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M queries and of the selection queries before them."""
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = ((tl.program_id(0) // heads) % batch).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) // (heads * batch)
    kv = h // (heads // kv_heads)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = rows < tokens
    q = rows_of(q_ptr + b * stride_qb + h * stride_qh, stride_qt, rows, tokens, D, BLOCK_D)
    grad = rows_of(grad_ptr + b * stride_gb + h * stride_gh, stride_gt, rows, tokens, D, BLOCK_D)
    select_q = shifted_rows(
        sq_ptr + b * stride_sqb + h * stride_sqh, stride_sqt, rows, tokens, E, BLOCK_E
    )  # fmt: skip
    per_query = (b * heads + h) * tokens + rows
    lse = tl.load(lse_ptr + per_query, mask=here, other=float("inf"))
    delta = tl.load(delta_ptr + per_query, mask=here, other=0.0)
    k_head = k_ptr + b * stride_kb + kv * stride_kh
    v_head = v_ptr + b * stride_vb + kv * stride_vh
    select_k_head = sk_ptr + b * stride_skb + h * stride_skh
    states = ((b * heads + h) * blocks + block) * tokens
    dq = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    dsq = tl.zeros((BLOCK_E, BLOCK_M), tl.float32)
    inner = tl.maximum(block * BLOCK_M - 1, 0) // BLOCK_N * BLOCK_N
    stop = tl.minimum((block + 1) * BLOCK_M, tokens)
    for edge in tl.static_range(2):
        for start_n in range(inner if edge else 0, stop if edge else inner, BLOCK_N):
            dq, dsq = spread(
                dq, dsq, q, grad, select_q, lse, delta, k_head, v_head, select_k_head, done_ptr + states,
                later_ptr + states, bias_ptr, stride_kt, stride_vt, stride_skt, rows,
                start_n + tl.arange(0, BLOCK_N), tokens, h, scale * LOG2E, select_scale * LOG2E, leak,
                BIAS, BOS, OWN, LEAKY, AFTER, D, BLOCK_D, E, BLOCK_E, edge,
            )  # fmt: skip
    ds = tl.arange(0, BLOCK_D)
    es = tl.arange(0, BLOCK_E)
    at = b * stride_db + h * stride_dh + rows.to(tl.int64)[None, :] * stride_dt + ds[:, None]
    tl.store(dq_ptr + at, dq * scale, mask=here[None, :] & (ds < D)[:, None])
    at = ((b * heads + h) * tokens + rows - 1).to(tl.int64)[None, :] * E + es[:, None]
    tl.store(dsq_ptr + at, dsq * select_scale, mask=(here & (rows > 0))[None, :] & (es < E)[:, None])


LAUNCH = {
    "states": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "forward": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 168},
    "keys": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "queries": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
}
"""Keys of a tile and launch options of the passes; a tile has BLOCK queries."""


def _common(q: Tensor, select_q: Tensor, bias: Tensor | None, switches: tuple[float, bool, bool, bool]):
    leak, bos, own, after = switches
    width, select = q.shape[-1], select_q.shape[-1]
    return {
        "BIAS": bias is not None, "BOS": bos, "OWN": own, "LEAKY": leak != 0, "AFTER": after, "D": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)), "E": select,
        "BLOCK_E": max(16, triton.next_power_of_2(select)), "BLOCK_M": BLOCK,
    }  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides over batch, heads and tokens; one head serves all."""
    return x.stride(0), 0 if x.shape[1] == 1 else x.stride(1), x.stride(2)


@torch.library.custom_op("headwise::own_mask_attention", mutates_args=())
def own_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select_q: Tensor,
    select_k: Tensor,
    bias: Tensor | None,
    scale: float,
    select_scale: float,
    leak: float,
    bos: bool,
    own: bool,
    after: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention under the masks that selection queries and keys make.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, K, T, D)`.
        select_q: `(B, H, T, E)`, E at most `WIDEST`.
        select_k: `(B, H or 1, T, E)`.
        bias: of the selection logits, `(H,)`.
        leak, bos, own, after: as `headwise.functional.selective.selection_mask` takes them.

    Returns:
        y `(B, H, T, D)`, laid out `(B, T, H, D)`; the log-sum-exp of each query in base 2; F at the start
        of each block of queries.
    """
    q, k, v, select_q, select_k = (packed(x) for x in (q, k, v, select_q, select_k))
    batch, heads, tokens, _ = q.shape
    blocks = triton.cdiv(tokens, BLOCK)
    y = output_like(q)
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    done = q.new_empty((batch, heads, blocks, tokens), dtype=torch.float32)
    options = _common(q, select_q, bias, (leak, bos, own, after))
    bias = q if bias is None else packed(bias)
    selects = (*_strides(select_q), *_strides(select_k))
    launch = LAUNCH["states"]
    few = {name: value for name, value in options.items() if name not in ("AFTER", "D", "BLOCK_D")}
    states_kernel[(triton.cdiv(tokens, launch["BLOCK_N"]) * batch * heads,)](
        select_q, select_k, bias, done, *selects, heads, tokens, blocks, select_scale, leak, **few, **launch
    )
    forward_kernel[(blocks * batch * heads,)](
        q, k, v, select_q, select_k, bias, done, y, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *selects, *y.stride()[:3],
        batch, heads, k.shape[1], tokens, blocks, scale, select_scale, leak, **options, **LAUNCH["forward"],
    )  # fmt: skip
    return y, lse, done


@own_mask_attention.register_fake
def _(q, k, v, select_q, select_k, bias, *settings):
    batch, heads, tokens, _ = q.shape
    return (
        output_like(q),
        q.new_empty((batch, heads, tokens), dtype=torch.float32),
        q.new_empty((batch, heads, -(-tokens // BLOCK), tokens), dtype=torch.float32),
    )


@torch.library.custom_op("headwise::own_mask_attention_backward", mutates_args=())
def own_mask_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select_q: Tensor,
    select_k: Tensor,
    bias: Tensor | None,
    y: Tensor,
    lse: Tensor,
    done: Tensor,
    scale: float,
    select_scale: float,
    leak: float,
    bos: bool,
    own: bool,
    after: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, select_q, and by head of select_k `(B, H, T, E)` and of the bias `(B, H, T)`."""
    dq, dk, dv = gradients_like(q, k)
    grad, q, k, v, select_q, select_k = (packed(x) for x in (grad, q, k, v, select_q, select_k))
    batch, heads, tokens, _ = q.shape
    kv_heads, blocks, select = k.shape[1], triton.cdiv(tokens, BLOCK), select_q.shape[-1]
    delta = delta_of(y, grad)
    dsq = q.new_empty((batch, heads, tokens, select))
    dsq[:, :, -1] = 0  # the last query takes nothing that another would see
    dsk = q.new_empty((batch, heads, tokens, select))
    d_bias = torch.empty_like(lse) if bias is not None else lse.new_empty(0)
    later = torch.empty_like(done)
    options = _common(q, select_q, bias, (leak, bos, own, after))
    inputs = (q, k, v, select_q, select_k, q if bias is None else packed(bias), done, later, grad, lse, delta)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_strides(select_q), *_strides(select_k))
    strides = (*strides, *grad.stride()[:3])
    sizes = (batch, heads, kv_heads, tokens, blocks, scale, select_scale, leak)
    launch = LAUNCH["keys"]
    keys_kernel[(triton.cdiv(tokens, launch["BLOCK_N"]) * batch * kv_heads,)](
        *inputs,
        dk,
        dv,
        dsk,
        d_bias,
        *strides,
        *dk.stride()[:3],
        *sizes,
        GROUP=heads // kv_heads,
        **options,
        **launch,
    )
    queries_kernel[(blocks * batch * heads,)](
        *inputs, dq, dsq, *strides, *dq.stride()[:3], *sizes, **options, **LAUNCH["queries"]
    )
    return dq, dk, dv, dsq, dsk, d_bias


@own_mask_attention_backward.register_fake
def _(grad, q, k, v, select_q, select_k, bias, y, lse, done, *settings):
    dsq = q.new_empty((*q.shape[:3], select_q.shape[-1]))
    d_bias = torch.empty_like(lse) if bias is not None else lse.new_empty(0)
    return *gradients_like(q, k), dsq, torch.empty_like(dsq), d_bias


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.select_scale, ctx.leak, ctx.bos, ctx.own, ctx.after = inputs
    y, lse, done = output
    ctx.mark_non_differentiable(lse, done)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, y, lse, done)


def _backward(ctx, grad, *_):
    tensors = ctx.saved_tensors
    settings = (ctx.scale, ctx.select_scale, ctx.leak, ctx.bos, ctx.own, ctx.after)
    dq, dk, dv, dsq, dsk, d_bias = own_mask_attention_backward(grad, *tensors, *settings)
    select_k, bias = tensors[4:6]
    dsk = dsk.sum(1, keepdim=True) if select_k.shape[1] == 1 else dsk
    d_bias = None if bias is None else d_bias.sum((0, 2)).to(bias.dtype)
    return dq, dk, dv, dsq, dsk, d_bias, *[None] * len(settings)


own_mask_attention.register_autograd(_backward, setup_context=_save)
