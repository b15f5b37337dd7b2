"""Causal softmax attention under a mask F that heads share, forward and backward.

    y_i = Σ_j softmax_j(scale · q_i·k_j - F[i,j]) v_j

Programs of the heads that share a mask are neighbours in the grid, so that a tile of F comes from
memory once and from the cache for the other heads. The gradient takes two passes, over queries for each
block of keys, and over keys for each block of queries. The second adds every head's share in the gradient
of F to memory with atomics; there a program owns two heads, where it can, and adds them up first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.functional.layout import packed, room_like
from headwise.functional.selective.kernel_tiles import place

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def mask_of(h, heads, masks):
    """Which mask head h uses (`headwise.functional.selective.mask_of_head`)."""
    group = heads // masks
    return tl.where(h < group * masks, h // group, (h - group * masks) % masks)


@triton.jit
def rows_of(ptr, stride, rows, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`(rows, BLOCK_D)` of a matrix `(tokens, D)`, zeros outside."""
    ds = tl.arange(0, BLOCK_D)
    return tl.load(
        ptr + rows.to(tl.int64)[:, None] * stride + ds[None, :],
        mask=(rows < tokens)[:, None] & (ds < D)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def tile_of_mask(taken_ptr, rows, cols, tokens, EDGE: tl.constexpr):
    """F · log2 e of a tile; +inf where a key is hidden."""
    at = rows.to(tl.int64)[:, None] * tokens + cols[None, :]
    if EDGE:
        seen = (rows[:, None] >= cols[None, :]) & (rows < tokens)[:, None]
        taken = tl.load(taken_ptr + at, mask=seen, other=0.0) * LOG2E
        taken = tl.where(seen, taken, float("inf"))
    else:
        taken = tl.load(taken_ptr + at) * LOG2E
    return taken


@triton.jit
def absorb_range(
    start, stop, acc, top, total, q, k_head, v_head, taken_ptr, stride_kt, stride_vt, rows, tokens, unit,
    EDGE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add keys start … stop to the running softmax of a block of queries."""
    for start_n in range(start, stop, BLOCK_N):
        cols = start_n + tl.arange(0, BLOCK_N)
        taken = tile_of_mask(taken_ptr, rows, cols, tokens, EDGE)
        k = rows_of(k_head, stride_kt, cols, tokens, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * unit - taken
        if EDGE:  # again, for a hidden key may be NaN
            seen = (rows[:, None] >= cols[None, :]) & (rows < tokens)[:, None]
            s = tl.where(seen, s, float("-inf"))
        highest = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - highest)
        p = tl.exp2(s - highest[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = rows_of(v_head, stride_vt, cols, tokens, D, BLOCK_D)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = highest
    return acc, top, total


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, taken_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, batch, heads, kv_heads, masks, tokens, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = ((tl.program_id(0) // heads) % batch).to(tl.int64)
    start_m = (tl.cdiv(tokens, BLOCK_M) - 1 - tl.program_id(0) // (heads * batch)) * BLOCK_M
    kv = h // (heads // kv_heads)
    rows = start_m + tl.arange(0, BLOCK_M)
    q = rows_of(q_ptr + b * stride_qb + h * stride_qh, stride_qt, rows, tokens, D, BLOCK_D)
    k_head = k_ptr + b * stride_kb + kv * stride_kh
    v_head = v_ptr + b * stride_vb + kv * stride_vh
    taken = taken_ptr + (b * masks + mask_of(h, heads, masks)) * tokens * tokens
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.zeros((BLOCK_M,), tl.float32) - 1e30
    total = tl.zeros((BLOCK_M,), tl.float32)
    full = tl.where(start_m + BLOCK_M <= tokens, start_m // BLOCK_N * BLOCK_N, 0)
    acc, top, total = absorb_range(
        0, full, acc, top, total, q, k_head, v_head, taken, stride_kt, stride_vt, rows, tokens,
        scale * LOG2E, False, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, top, total = absorb_range(
        full, tl.minimum(start_m + BLOCK_M, tokens), acc, top, total, q, k_head, v_head, taken, stride_kt,
        stride_vt, rows, tokens, scale * LOG2E, True, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    ds = tl.arange(0, BLOCK_D)
    here = rows < tokens
    at = b * stride_ob + h * stride_oh + rows.to(tl.int64)[:, None] * stride_ot + ds[None, :]
    tl.store(out_ptr + at, acc / total[:, None], mask=here[:, None] & (ds < D)[None, :])
    tl.store(lse_ptr + (b * heads + h) * tokens + rows, top + tl.log2(total), mask=here)


@triton.jit
def delta_kernel(
    out_ptr, grad_ptr, delta_ptr, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    heads, tokens, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`Σ_d y · dy` of each query."""
    h = (tl.program_id(0) % heads).to(tl.int64)
    b = (tl.program_id(0) // heads).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = rows_of(out_ptr + b * stride_ob + h * stride_oh, stride_ot, rows, tokens, D, BLOCK_D)
    grad = rows_of(grad_ptr + b * stride_gb + h * stride_gh, stride_gt, rows, tokens, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + tl.program_id(0).to(tl.int64) * tokens + rows, delta, mask=rows < tokens)


@triton.jit
def flip_kernel(taken_ptr, flipped_ptr, tokens, BLOCK: tl.constexpr):
    """F with queries and keys exchanged, tile by tile, where a key is visible."""
    block, column, bm = place(tl.cdiv(tokens, BLOCK), tl.cdiv(tokens, BLOCK))
    if column > block:
        return
    start_m = block * BLOCK
    start_n = column * BLOCK
    rows = start_m + tl.arange(0, BLOCK)
    cols = start_n + tl.arange(0, BLOCK)
    square = bm * tokens * tokens
    inside = (rows < tokens)[:, None] & (cols < tokens)[None, :]
    at = square + rows.to(tl.int64)[:, None] * tokens + cols[None, :]
    tile = tl.trans(tl.load(taken_ptr + at, mask=inside, other=0.0))
    at = square + cols.to(tl.int64)[:, None] * tokens + rows[None, :]
    tl.store(flipped_ptr + at, tile, mask=(cols < tokens)[:, None] & (rows < tokens)[None, :])


@triton.jit
def add_queries_range(
    start, stop, dk, dv, k, v, q_head, grad_head, lse_ptr, delta_ptr, flipped_ptr, stride_qt, stride_gt,
    cols, tokens, unit, EDGE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add queries start … stop of a head to the gradients of keys and values; tiles lie keys by queries."""
    for start_m in range(start, stop, BLOCK_M):
        rows = start_m + tl.arange(0, BLOCK_M)
        here = rows < tokens
        at = cols.to(tl.int64)[:, None] * tokens + rows[None, :]
        if EDGE:
            seen = (rows[None, :] >= cols[:, None]) & here[None, :]
            taken = tl.load(flipped_ptr + at, mask=seen, other=0.0) * LOG2E
            taken = tl.where(seen, taken, float("inf"))
        else:
            taken = tl.load(flipped_ptr + at, mask=here[None, :], other=0.0) * LOG2E
        q = rows_of(q_head, stride_qt, rows, tokens, D, BLOCK_D)
        lse = tl.load(lse_ptr + rows, mask=here, other=float("inf"))
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * unit - taken - lse[None, :])
        grad = rows_of(grad_head, stride_gt, rows, tokens, D, BLOCK_D)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + rows, mask=here, other=0.0)
        slope = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
        dk = tl.dot(slope.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, flipped_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    batch, heads, kv_heads, masks, tokens, scale, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values."""
    kv = (tl.program_id(0) % kv_heads).to(tl.int64)
    b = ((tl.program_id(0) // kv_heads) % batch).to(tl.int64)
    start_n = tl.program_id(0) // (kv_heads * batch) * BLOCK_N
    cols = start_n + tl.arange(0, BLOCK_N)
    k = rows_of(k_ptr + b * stride_kb + kv * stride_kh, stride_kt, cols, tokens, D, BLOCK_D)
    v = rows_of(v_ptr + b * stride_vb + kv * stride_vh, stride_vt, cols, tokens, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = start_n // BLOCK_M * BLOCK_M
    whole = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M, tokens)
    for member in range(GROUP):
        h = kv * GROUP + member
        q_head = q_ptr + b * stride_qb + h * stride_qh
        grad_head = grad_ptr + b * stride_gb + h * stride_gh
        flipped = flipped_ptr + (b * masks + mask_of(h, heads, masks)) * tokens * tokens
        lse = lse_ptr + (b * heads + h) * tokens
        delta = delta_ptr + (b * heads + h) * tokens
        dk, dv = add_queries_range(
            first, whole, dk, dv, k, v, q_head, grad_head, lse, delta, flipped, stride_qt, stride_gt,
            cols, tokens, scale * LOG2E, True, D, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        dk, dv = add_queries_range(
            whole, tokens, dk, dv, k, v, q_head, grad_head, lse, delta, flipped, stride_qt, stride_gt,
            cols, tokens, scale * LOG2E, False, D, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    ds = tl.arange(0, BLOCK_D)
    at = b * stride_db + kv * stride_dh + cols.to(tl.int64)[:, None] * stride_dt + ds[None, :]
    inside = (cols < tokens)[:, None] & (ds < D)[None, :]
    tl.store(dk_ptr + at, dk * scale, mask=inside)
    tl.store(dv_ptr + at, dv, mask=inside)


@triton.jit
def add_keys(
    dq, q, grad, lse, delta, k_head, v_head, taken, stride_kt, stride_vt, cols, tokens, unit,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add a block of keys to the gradient of a head's queries; also the gradient of the tile's logits."""
    k = rows_of(k_head, stride_kt, cols, tokens, D, BLOCK_D)
    v = rows_of(v_head, stride_vt, cols, tokens, D, BLOCK_D)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * unit - taken - lse[:, None])
    slope = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(slope.to(k.dtype), k, dq, input_precision="ieee"), slope


@triton.jit
def add_keys_range(
    start, stop, sums, queries, grads, lses, deltas, keys, values, taken_ptr, d_taken_ptr,
    stride_kt, stride_vt, rows, tokens, unit, EDGE: tl.constexpr, PAIR: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Walk over keys start … stop; what the heads ask of F is added up in memory."""
    dq0, dq1 = sums
    for start_n in range(start, stop, BLOCK_N):
        cols = start_n + tl.arange(0, BLOCK_N)
        taken = tile_of_mask(taken_ptr, rows, cols, tokens, EDGE)
        dq0, slope = add_keys(
            dq0, queries[0], grads[0], lses[0], deltas[0], keys[0], values[0], taken, stride_kt, stride_vt,
            cols, tokens, unit, D, BLOCK_D,
        )  # fmt: skip
        if PAIR:
            dq1, other = add_keys(
                dq1, queries[1], grads[1], lses[1], deltas[1], keys[1], values[1], taken, stride_kt,
                stride_vt, cols, tokens, unit, D, BLOCK_D,
            )  # fmt: skip
            slope += other
        at = rows.to(tl.int64)[:, None] * tokens + cols[None, :]
        if EDGE:
            seen = (rows[:, None] >= cols[None, :]) & (rows < tokens)[:, None]
            tl.atomic_add(d_taken_ptr + at, -slope, mask=seen, sem="relaxed")
        else:
            tl.atomic_add(d_taken_ptr + at, -slope, sem="relaxed")
    return dq0, dq1


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, taken_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, d_taken_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    batch, heads, kv_heads, masks, tokens, scale,
    PAIR: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries, and their heads' share in the gradient of F."""
    each: tl.constexpr = 2 if PAIR else 1
    units = heads // each
    h = (tl.program_id(0) % units) * each
    b = ((tl.program_id(0) // units) % batch).to(tl.int64)
    start_m = (tl.cdiv(tokens, BLOCK_M) - 1 - tl.program_id(0) // (units * batch)) * BLOCK_M
    group = heads // kv_heads
    kv0 = (h // group).to(tl.int64)
    kv1 = ((h + each - 1) // group).to(tl.int64)
    rows = start_m + tl.arange(0, BLOCK_M)
    here = rows < tokens
    h = h.to(tl.int64)
    q_head = q_ptr + b * stride_qb + h * stride_qh
    grad_head = grad_ptr + b * stride_gb + h * stride_gh
    q0 = rows_of(q_head, stride_qt, rows, tokens, D, BLOCK_D)
    grad0 = rows_of(grad_head, stride_gt, rows, tokens, D, BLOCK_D)
    k_batch = k_ptr + b * stride_kb
    v_batch = v_ptr + b * stride_vb
    keys = (k_batch + kv0 * stride_kh, k_batch + kv1 * stride_kh)
    values = (v_batch + kv0 * stride_vh, v_batch + kv1 * stride_vh)
    square = (b * masks + mask_of(h, heads, masks)) * tokens * tokens
    per_query = (b * heads + h) * tokens + rows
    lse0 = tl.load(lse_ptr + per_query, mask=here, other=0.0)
    delta0 = tl.load(delta_ptr + per_query, mask=here, other=0.0)
    q1 = q0
    grad1 = grad0
    lse1 = lse0
    delta1 = delta0
    if PAIR:
        q1 = rows_of(q_head + stride_qh, stride_qt, rows, tokens, D, BLOCK_D)
        grad1 = rows_of(grad_head + stride_gh, stride_gt, rows, tokens, D, BLOCK_D)
        lse1 = tl.load(lse_ptr + per_query + tokens, mask=here, other=0.0)
        delta1 = tl.load(delta_ptr + per_query + tokens, mask=here, other=0.0)
    zero = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums = (zero, zero)
    full = tl.where(start_m + BLOCK_M <= tokens, start_m // BLOCK_N * BLOCK_N, 0)
    sums = add_keys_range(
        0, full, sums, (q0, q1), (grad0, grad1), (lse0, lse1), (delta0, delta1), keys, values,
        taken_ptr + square, d_taken_ptr + square, stride_kt, stride_vt, rows, tokens, scale * LOG2E,
        False, PAIR, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    sums = add_keys_range(
        full, tl.minimum(start_m + BLOCK_M, tokens), sums, (q0, q1), (grad0, grad1), (lse0, lse1),
        (delta0, delta1), keys, values, taken_ptr + square, d_taken_ptr + square, stride_kt, stride_vt,
        rows, tokens, scale * LOG2E, True, PAIR, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    ds = tl.arange(0, BLOCK_D)
    at = b * stride_db + h * stride_dh + rows.to(tl.int64)[:, None] * stride_dt + ds[None, :]
    inside = here[:, None] & (ds < D)[None, :]
    tl.store(dq_ptr + at, sums[0] * scale, mask=inside)
    if PAIR:
        tl.store(dq_ptr + at + stride_dh, sums[1] * scale, mask=inside)


BLOCKS = {
    "forward": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 128},
    "keys": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
    "queries": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
}
"""Tile shapes and launch options of the three passes up to a head width of 64; others above."""


def blocks_for(step: str, q: Tensor) -> dict[str, int]:
    """The tile shapes of a pass."""
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    narrow = block_d <= 64 and q.dtype != torch.float32
    found = BLOCKS[step] if narrow else {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return found | {"BLOCK_D": block_d, "D": q.shape[-1]}


def in_pairs(q: Tensor, masks: int, block_d: int) -> bool:
    """Whether two heads may share a program: each pair must share a mask, and registers must suffice."""
    return q.shape[1] % (2 * masks) == 0 and block_d <= 64 and q.dtype != torch.float32


def output_like(q: Tensor) -> Tensor:
    """Room for an output of the shape of `q (B, H, T, D)`, laid out `(B, T, H, D)` for what follows."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def gradients_like(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of q, k and v, laid out as q and k: in another layout they would be copied.

    Takes q and k as given, not packed: where a tensor begins is unknown while a program is traced.
    """
    return room_like(q), room_like(k), room_like(k)


def delta_of(y: Tensor, grad: Tensor) -> Tensor:
    """`Σ_d y · dy` of each query, `(B, H, T)` float32."""
    batch, heads, tokens, width = y.shape
    delta = y.new_empty((batch, heads, tokens), dtype=torch.float32)
    delta_kernel[(batch * heads, triton.cdiv(tokens, 64))](
        y, grad, delta, *y.stride()[:3], *grad.stride()[:3], heads, tokens,
        D=width, BLOCK_M=64, BLOCK_D=max(16, triton.next_power_of_2(width)),
    )  # fmt: skip
    return delta


@torch.library.custom_op("headwise::masked_attention", mutates_args=())
def masked_attention(q: Tensor, k: Tensor, v: Tensor, taken: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention under F.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, K, T, D)`.
        taken: F, `(B, M, T, T)` float32, contiguous; read on and below the diagonal only.

    Returns:
        y `(B, H, T, D)`, laid out `(B, T, H, D)`; the log-sum-exp of each query in base 2, `(B, H, T)`.
    """
    q, k, v = packed(q), packed(k), packed(v)
    batch, heads, tokens, _ = q.shape
    y = output_like(q)
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    options = blocks_for("forward", q)
    forward_kernel[(triton.cdiv(tokens, options["BLOCK_M"]) * batch * heads,)](
        q, k, v, taken, y, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:3],
        batch, heads, k.shape[1], taken.shape[1], tokens, scale, **options,
    )  # fmt: skip
    return y, lse


@masked_attention.register_fake
def _(q, k, v, taken, scale):
    return output_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("headwise::masked_attention_backward", mutates_args=())
def masked_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, taken: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and F (on and below the diagonal; above it they are undefined)."""
    dq, dk, dv = gradients_like(q, k)
    grad, q, k, v = packed(grad), packed(q), packed(k), packed(v)
    batch, heads, tokens, _ = q.shape
    kv_heads, masks = k.shape[1], taken.shape[1]
    delta = delta_of(y, grad)
    flipped = torch.empty_like(taken)
    blocks = triton.cdiv(tokens, 64)
    flip_kernel[(blocks * blocks * batch * masks,)](taken, flipped, tokens, BLOCK=64, num_warps=8)
    others = (grad, lse, delta)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    sizes = (batch, heads, kv_heads, masks, tokens, scale)
    options = blocks_for("keys", q)
    keys_kernel[(triton.cdiv(tokens, options["BLOCK_N"]) * batch * kv_heads,)](
        q, k, v, flipped, *others, dk, dv, *strides, *dk.stride()[:3], *sizes,
        GROUP=heads // kv_heads, **options,
    )  # fmt: skip
    del flipped
    d_taken = torch.zeros_like(taken)
    options = blocks_for("queries", q)
    pair = in_pairs(q, masks, options["BLOCK_D"])
    grid = (triton.cdiv(tokens, options["BLOCK_M"]) * batch * heads // (1 + pair),)
    queries_kernel[grid](
        q, k, v, taken, *others, dq, d_taken, *strides, *dq.stride()[:3], *sizes, PAIR=pair, **options
    )
    return dq, dk, dv, d_taken


@masked_attention_backward.register_fake
def _(grad, q, k, v, taken, y, lse, scale):
    return *gradients_like(q, k), torch.empty_like(taken)


def _save(ctx, inputs, output):
    q, k, v, taken, ctx.scale = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, taken, y, lse)


def _backward(ctx, grad, _):
    return *masked_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


masked_attention.register_autograd(_backward, setup_context=_save)
