"""Causal softmax attention under a mask F that heads share, forward and backward.

    y_i = Σ_j softmax_j(scale · q_i·k_j - F[i,j]) v_j

Programs of the heads that share a mask are neighbours in the grid, so that a tile of F comes from
memory once and from the cache for the other heads. The gradient is computed in three passes, each of
which owns what it writes (keys and values, queries, tiles of F): no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def scores(
    q, k, taken_ptr, rows, cols, tokens, scale, EDGE: tl.constexpr,
):  # fmt: skip
    """`(scale · q·k - F) · log2 e` of a tile; hidden keys at -inf."""
    at = rows.to(tl.int64)[:, None] * tokens + cols[None, :]
    product = tl.dot(q, tl.trans(k), input_precision="ieee")
    if EDGE:
        seen = (rows[:, None] >= cols[None, :]) & (rows < tokens)[:, None]
        taken = tl.load(taken_ptr + at, mask=seen, other=0.0)
        s = product * (scale * LOG2E) - taken * LOG2E
        s = tl.where(seen, s, float("-inf"))
    else:
        s = product * (scale * LOG2E) - tl.load(taken_ptr + at) * LOG2E
    return s


@triton.jit
def absorb(
    acc, top, total, q, k_head, v_head, taken_ptr, stride_kt, stride_vt, rows, start_n, tokens, scale,
    EDGE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add a tile to the running softmax."""
    cols = start_n + tl.arange(0, BLOCK_N)
    k = rows_of(k_head, stride_kt, cols, tokens, D, BLOCK_D)
    s = scores(q, k, taken_ptr, rows, cols, tokens, scale, EDGE)
    highest = tl.maximum(top, tl.max(s, 1))
    if EDGE:
        highest = tl.maximum(highest, -1e30)
    shrink = tl.exp2(top - highest)
    p = tl.exp2(s - highest[:, None])
    total = total * shrink + tl.sum(p, 1)
    v = rows_of(v_head, stride_vt, cols, tokens, D, BLOCK_D)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, highest, total


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, taken_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, batch, heads, kv_heads, masks, tokens, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0) % heads
    b = ((tl.program_id(0) // heads) % batch).to(tl.int64)
    start_m = (tl.cdiv(tokens, BLOCK_M) - 1 - tl.program_id(0) // (heads * batch)) * BLOCK_M
    kv = (h // (heads // kv_heads)).to(tl.int64)
    rows = start_m + tl.arange(0, BLOCK_M)
    q = rows_of(
        q_ptr + b * stride_qb + h.to(tl.int64) * stride_qh, stride_qt, rows, tokens, D, BLOCK_D
    )  # fmt: skip
    k_head = k_ptr + b * stride_kb + kv * stride_kh
    v_head = v_ptr + b * stride_vb + kv * stride_vh
    taken = taken_ptr + (b * masks + mask_of(h, heads, masks)) * tokens * tokens
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.zeros((BLOCK_M,), tl.float32) - 1e30
    total = tl.zeros((BLOCK_M,), tl.float32)
    full = tl.where(start_m + BLOCK_M <= tokens, start_m // BLOCK_N * BLOCK_N, 0)
    for start_n in range(0, full, BLOCK_N):
        acc, top, total = absorb(
            acc, top, total, q, k_head, v_head, taken, stride_kt, stride_vt, rows, start_n, tokens, scale,
            False, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for start_n in range(full, tl.minimum(start_m + BLOCK_M, tokens), BLOCK_N):
        acc, top, total = absorb(
            acc, top, total, q, k_head, v_head, taken, stride_kt, stride_vt, rows, start_n, tokens, scale,
            True, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    here = rows < tokens
    ds = tl.arange(0, BLOCK_D)
    out = out_ptr + b * stride_ob + h.to(tl.int64) * stride_oh
    tl.store(
        out + rows.to(tl.int64)[:, None] * stride_ot + ds[None, :], acc / total[:, None],
        mask=here[:, None] & (ds < D)[None, :],
    )  # fmt: skip
    tl.store(lse_ptr + (b * heads + h) * tokens + rows, top + tl.log2(total), mask=here)


@triton.jit
def delta_kernel(
    out_ptr, grad_ptr, delta_ptr, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    heads, tokens, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`Σ_d y · dy` of each query."""
    h = (tl.program_id(1) % heads).to(tl.int64)
    b = (tl.program_id(1) // heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = rows_of(out_ptr + b * stride_ob + h * stride_oh, stride_ot, rows, tokens, D, BLOCK_D)
    grad = rows_of(grad_ptr + b * stride_gb + h * stride_gh, stride_gt, rows, tokens, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + tl.program_id(1).to(tl.int64) * tokens + rows, delta, mask=rows < tokens)


@triton.jit
def weights_and_slopes(
    q, k, v, grad, taken_ptr, lse, delta, rows, cols, tokens, scale, EDGE: tl.constexpr,
):  # fmt: skip
    """p and the gradient of the logits, of a tile."""
    p = tl.exp2(scores(q, k, taken_ptr, rows, cols, tokens, scale, EDGE) - lse[:, None])
    slope = tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None]
    return p, p * slope


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, taken_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    batch, heads, kv_heads, masks, tokens, scale,
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
    group = heads // kv_heads
    first = start_n // BLOCK_M * BLOCK_M
    whole = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M, tokens)
    last = tl.maximum(tokens // BLOCK_M * BLOCK_M, whole)
    if start_n + BLOCK_N > tokens:
        last = whole
    for member in range(0, group):
        h = (kv * group + member).to(tl.int64)
        q_head = q_ptr + b * stride_qb + h * stride_qh
        grad_head = grad_ptr + b * stride_gb + h * stride_gh
        taken = taken_ptr + (b * masks + mask_of(h, heads, masks)) * tokens * tokens
        lse = lse_ptr + (b * heads + h) * tokens
        delta = delta_ptr + (b * heads + h) * tokens
        for start_m in range(first, whole, BLOCK_M):
            dk, dv = add_queries(
                dk, dv, k, v, q_head, grad_head, taken, lse, delta, stride_qt, stride_gt, start_m, cols,
                tokens, scale, True, D, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        for start_m in range(whole, last, BLOCK_M):
            dk, dv = add_queries(
                dk, dv, k, v, q_head, grad_head, taken, lse, delta, stride_qt, stride_gt, start_m, cols,
                tokens, scale, False, D, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        for start_m in range(last, tokens, BLOCK_M):
            dk, dv = add_queries(
                dk, dv, k, v, q_head, grad_head, taken, lse, delta, stride_qt, stride_gt, start_m, cols,
                tokens, scale, True, D, BLOCK_M, BLOCK_D,
            )  # fmt: skip
    ds = tl.arange(0, BLOCK_D)
    at = b * stride_db + kv * stride_dh + cols.to(tl.int64)[:, None] * stride_dt + ds[None, :]
    inside = (cols < tokens)[:, None] & (ds < D)[None, :]
    tl.store(dk_ptr + at, dk * scale, mask=inside)
    tl.store(dv_ptr + at, dv, mask=inside)


@triton.jit
def add_queries(
    dk, dv, k, v, q_head, grad_head, taken, lse_ptr, delta_ptr, stride_qt, stride_gt, start_m, cols,
    tokens, scale, EDGE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add a block of queries to the gradients of keys and values; the tile lies keys by queries."""
    rows = start_m + tl.arange(0, BLOCK_M)
    here = rows < tokens
    q = rows_of(q_head, stride_qt, rows, tokens, D, BLOCK_D)
    product = tl.dot(k, tl.trans(q), input_precision="ieee")
    lse = tl.load(lse_ptr + rows, mask=here, other=0.0)
    at = rows.to(tl.int64)[:, None] * tokens + cols[None, :]
    if EDGE:
        seen = (rows[:, None] >= cols[None, :]) & here[:, None]
        f = tl.trans(tl.load(taken + at, mask=seen, other=0.0))
        s = product * (scale * LOG2E) - f * LOG2E
        s = tl.where(tl.trans(seen), s, float("-inf"))
    else:
        s = product * (scale * LOG2E) - tl.trans(tl.load(taken + at)) * LOG2E
    p = tl.exp2(s - lse[None, :])
    grad = rows_of(grad_head, stride_gt, rows, tokens, D, BLOCK_D)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    delta = tl.load(delta_ptr + rows, mask=here, other=0.0)
    slope = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
    dk = tl.dot(slope.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, taken_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    batch, heads, kv_heads, masks, tokens, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries."""
    h = tl.program_id(0) % heads
    b = ((tl.program_id(0) // heads) % batch).to(tl.int64)
    start_m = (tl.cdiv(tokens, BLOCK_M) - 1 - tl.program_id(0) // (heads * batch)) * BLOCK_M
    kv = (h // (heads // kv_heads)).to(tl.int64)
    h = h.to(tl.int64)
    rows = start_m + tl.arange(0, BLOCK_M)
    here = rows < tokens
    q = rows_of(q_ptr + b * stride_qb + h * stride_qh, stride_qt, rows, tokens, D, BLOCK_D)
    grad = rows_of(grad_ptr + b * stride_gb + h * stride_gh, stride_gt, rows, tokens, D, BLOCK_D)
    k_head = k_ptr + b * stride_kb + kv * stride_kh
    v_head = v_ptr + b * stride_vb + kv * stride_vh
    taken = taken_ptr + (b * masks + mask_of(h, heads, masks)) * tokens * tokens
    lse = tl.load(lse_ptr + (b * heads + h) * tokens + rows, mask=here, other=0.0)
    delta = tl.load(delta_ptr + (b * heads + h) * tokens + rows, mask=here, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full = tl.where(start_m + BLOCK_M <= tokens, start_m // BLOCK_N * BLOCK_N, 0)
    for start_n in range(0, full, BLOCK_N):
        cols = start_n + tl.arange(0, BLOCK_N)
        k = rows_of(k_head, stride_kt, cols, tokens, D, BLOCK_D)
        v = rows_of(v_head, stride_vt, cols, tokens, D, BLOCK_D)
        _, slope = weights_and_slopes(
            q, k, v, grad, taken, lse, delta, rows, cols, tokens, scale, False
        )  # fmt: skip
        dq = tl.dot(slope.to(k.dtype), k, dq, input_precision="ieee")
    for start_n in range(full, tl.minimum(start_m + BLOCK_M, tokens), BLOCK_N):
        cols = start_n + tl.arange(0, BLOCK_N)
        k = rows_of(k_head, stride_kt, cols, tokens, D, BLOCK_D)
        v = rows_of(v_head, stride_vt, cols, tokens, D, BLOCK_D)
        _, slope = weights_and_slopes(
            q, k, v, grad, taken, lse, delta, rows, cols, tokens, scale, True
        )  # fmt: skip
        dq = tl.dot(slope.to(k.dtype), k, dq, input_precision="ieee")
    ds = tl.arange(0, BLOCK_D)
    at = b * stride_db + h * stride_dh + rows.to(tl.int64)[:, None] * stride_dt + ds[None, :]
    tl.store(dq_ptr + at, dq * scale, mask=here[:, None] & (ds < D)[None, :])


@triton.jit
def mask_slopes_kernel(
    q_ptr, k_ptr, v_ptr, taken_ptr, grad_ptr, lse_ptr, delta_ptr, d_taken_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, batch, heads, kv_heads, masks, tokens, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of F: over its heads, the sum of minus the gradient of the logits."""
    start_m = tl.program_id(0) * BLOCK_M
    start_n = tl.program_id(1) * BLOCK_N
    if start_n >= start_m + BLOCK_M:
        return
    mask = tl.program_id(2) % masks
    b = (tl.program_id(2) // masks).to(tl.int64)
    rows = start_m + tl.arange(0, BLOCK_M)
    cols = start_n + tl.arange(0, BLOCK_N)
    here = rows < tokens
    seen = (rows[:, None] >= cols[None, :]) & here[:, None]
    at = tl.program_id(2).to(tl.int64) * tokens * tokens + rows.to(tl.int64)[:, None] * tokens + cols[None, :]
    f = tl.load(taken_ptr + at, mask=seen, other=0.0) * LOG2E
    f = tl.where(seen, f, float("inf"))
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    group = heads // masks
    wrapped = mask < heads - group * masks
    for member in range(0, group + wrapped.to(tl.int32)):
        h = tl.where(member < group, mask * group + member, group * masks + mask).to(tl.int64)
        kv = h // (heads // kv_heads)
        q = rows_of(q_ptr + b * stride_qb + h * stride_qh, stride_qt, rows, tokens, D, BLOCK_D)
        k = rows_of(k_ptr + b * stride_kb + kv * stride_kh, stride_kt, cols, tokens, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E) - f
        lse = tl.load(lse_ptr + (b * heads + h) * tokens + rows, mask=here, other=0.0)
        p = tl.exp2(s - lse[:, None])
        grad = rows_of(grad_ptr + b * stride_gb + h * stride_gh, stride_gt, rows, tokens, D, BLOCK_D)
        v = rows_of(v_ptr + b * stride_vb + kv * stride_vh, stride_vt, cols, tokens, D, BLOCK_D)
        delta = tl.load(delta_ptr + (b * heads + h) * tokens + rows, mask=here, other=0.0)
        total += p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
    tl.store(d_taken_ptr + at, -total, mask=here[:, None] & (cols < tokens)[None, :])


BLOCKS = {
    "forward": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    "keys": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "queries": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "mask": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
}
"""Tile shapes and launch options of the four passes; smaller ones above a head width of 64."""


def blocks_for(step: str, q: Tensor) -> dict[str, int]:
    """The tile shapes of a pass for q's width and dtype."""
    found = dict(BLOCKS[step])
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    if block_d > 64 or q.dtype == torch.float32:
        found |= {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return found | {"BLOCK_D": block_d, "D": q.shape[-1]}


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


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
    q, k, v = _packed(q), _packed(k), _packed(v)
    batch, heads, tokens, width = q.shape
    y = q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    options = blocks_for("forward", q)
    grid = (triton.cdiv(tokens, options["BLOCK_M"]) * batch * heads,)
    forward_kernel[grid](
        q, k, v, taken, y, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:3],
        batch, heads, k.shape[1], taken.shape[1], tokens, scale, **options,
    )  # fmt: skip
    return y, lse


@masked_attention.register_fake
def _(q, k, v, taken, scale):  # type: ignore[no-untyped-def]
    batch, heads, tokens, width = q.shape
    y = q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return y, q.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("headwise::masked_attention_backward", mutates_args=())
def masked_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, taken: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and F (on and below the diagonal; above it they are undefined)."""
    grad, q, k, v = _packed(grad), _packed(q), _packed(k), _packed(v)
    batch, heads, tokens, width = q.shape
    kv_heads, masks = k.shape[1], taken.shape[1]
    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(tokens, 64), batch * heads)](
        y, grad, delta, *y.stride()[:3], *grad.stride()[:3], heads, tokens,
        D=width, BLOCK_M=64, BLOCK_D=max(16, triton.next_power_of_2(width)),
    )  # fmt: skip
    dq = q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    dk, dv = (k.new_empty((batch, tokens, kv_heads, width)).transpose(1, 2) for _ in range(2))
    d_taken = torch.empty_like(taken)
    shared = (
        q, k, v, taken, grad, lse, delta,
    )  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    sizes = (batch, heads, kv_heads, masks, tokens, scale)
    options = blocks_for("keys", q)
    grid = (triton.cdiv(tokens, options["BLOCK_N"]) * batch * kv_heads,)
    keys_kernel[grid](*shared, dk, dv, *strides, *dk.stride()[:3], *sizes, **options)
    options = blocks_for("queries", q)
    grid = (triton.cdiv(tokens, options["BLOCK_M"]) * batch * heads,)
    queries_kernel[grid](*shared, dq, *strides, *dq.stride()[:3], *sizes, **options)
    options = blocks_for("mask", q)
    tiles = (triton.cdiv(tokens, options["BLOCK_M"]), triton.cdiv(tokens, options["BLOCK_N"]), batch * masks)
    mask_slopes_kernel[tiles](*shared, d_taken, *strides, *sizes, **options)
    return dq, dk, dv, d_taken


@masked_attention_backward.register_fake
def _(grad, q, k, v, taken, y, lse, scale):  # type: ignore[no-untyped-def]
    def laid_out(x: Tensor) -> Tensor:
        batch, heads, tokens, width = x.shape
        return x.new_empty((batch, tokens, heads, width)).transpose(1, 2)

    return laid_out(q), laid_out(k), laid_out(v), torch.empty_like(taken)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, taken, ctx.scale = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, taken, y, lse)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    return *masked_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


masked_attention.register_autograd(_backward, setup_context=_save)
