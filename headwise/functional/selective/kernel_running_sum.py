"""F as the plain running sum over queries, and its gradient, all blocks of queries at once.

Three steps: the sums of each block (`block_sums_kernel`), what came before each block (`offsets_kernel`, in
float64), and the tiles (`sum_kernel`). What query l does to a key counts from query l + 1 on, so a tile of F
at queries r needs logits at queries r - 1: rows are read shifted, and every sum is inclusive. The gradient,
the sum of F's gradients from query l + 1 on, takes the same three steps from behind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.functional.selective.kernel_sums import down_columns
from headwise.functional.selective.kernel_tiles import BLOCK_M, attack_tile, block_of, place, strides


@triton.jit
def block_sums_kernel(
    q_ptr, k_ptr, bias_ptr, sums_ptr,
    stride_qb, stride_qm, stride_qt, stride_kb, stride_km, stride_kt, masks, tokens, blocks, scale, leak,
    E: tl.constexpr, BIAS: tl.constexpr, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What each block of queries does to each key."""
    block, column, bm = place(blocks, tl.cdiv(tokens, BLOCK_N))
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    b = bm // masks
    m = bm % masks
    total = tl.zeros((BLOCK_N,), tl.float32)
    if column * BLOCK_N < (block + 1) * BLOCK_M:
        attack, _, _ = attack_tile(
            q_ptr + b * stride_qb + m * stride_qm, k_ptr + b * stride_kb + m * stride_km, bias_ptr + m,
            stride_qt, stride_kt, rows - 1, cols, tokens, scale, leak,
            E, BIAS, BOS, OWN, LEAKY, BLOCK_M, BLOCK_N, BLOCK_E,
        )  # fmt: skip
        total = tl.sum(attack, 0)
    at = (bm * blocks + block) * tokens + cols
    tl.store(sums_ptr + at, total, mask=cols < tokens)


@triton.jit
def offsets_kernel(
    sums_ptr, high_ptr, low_ptr, tokens, blocks, BEHIND: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of all blocks before each one (after it where BEHIND), as two floats."""
    _, column, bm = place(1, tl.cdiv(tokens, BLOCK_N))
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    base = bm * blocks * tokens
    carried = tl.zeros((BLOCK_N,), tl.float64)
    for index in range(tl.cdiv(blocks, BLOCK_B)):
        chunk = index
        if BEHIND:
            chunk = tl.cdiv(blocks, BLOCK_B) - 1 - index
        at_blocks = chunk * BLOCK_B + tl.arange(0, BLOCK_B)
        inside = (at_blocks < blocks)[:, None] & (cols < tokens)[None, :]
        at = base + at_blocks.to(tl.int64)[:, None] * tokens + cols[None, :]
        part = tl.load(sums_ptr + at, mask=inside, other=0.0).to(tl.float64)
        offset = carried[None, :] + tl.cumsum(part, 0) - part
        if BEHIND:
            offset = carried[None, :] + tl.sum(part, 0)[None, :] - tl.cumsum(part, 0)
        high = offset.to(tl.float32)
        tl.store(high_ptr + at, high, mask=inside)
        tl.store(low_ptr + at, (offset - high.to(tl.float64)).to(tl.float32), mask=inside)
        carried += tl.sum(part, 0)


@triton.jit
def sum_kernel(
    q_ptr, k_ptr, bias_ptr, high_ptr, low_ptr, out_ptr,
    stride_qb, stride_qm, stride_qt, stride_kb, stride_km, stride_kt, masks, tokens, blocks, scale, leak,
    E: tl.constexpr, BIAS: tl.constexpr, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr,
    AFTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A tile of F."""
    block, column, bm = place(blocks, tl.cdiv(tokens, BLOCK_N))
    if column * BLOCK_N >= (block + 1) * BLOCK_M:
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    b = bm // masks
    m = bm % masks
    attack, _, _ = attack_tile(
        q_ptr + b * stride_qb + m * stride_qm, k_ptr + b * stride_kb + m * stride_km, bias_ptr + m,
        stride_qt, stride_kt, rows - 1, cols, tokens, scale, leak,
        E, BIAS, BOS, OWN, LEAKY, BLOCK_M, BLOCK_N, BLOCK_E,
    )  # fmt: skip
    at = (bm * blocks + block) * tokens + cols
    high = tl.load(high_ptr + at, mask=cols < tokens, other=0.0)
    low = tl.load(low_ptr + at, mask=cols < tokens, other=0.0)
    taken = high[None, :] + (down_columns(attack, False, True) + low[None, :])
    if AFTER:
        taken = tl.maximum(taken, 0.0)
    taken = tl.where(rows[:, None] > cols[None, :], taken, 0.0)
    at = (bm * tokens + rows)[:, None] * tokens + cols[None, :]
    tl.store(out_ptr + at, taken, mask=(rows < tokens)[:, None] & (cols < tokens)[None, :])


@triton.jit
def gradients(grad_ptr, out_ptr, square, rows, cols, tokens, AFTER: tl.constexpr):
    """F's gradients of a tile, where they count."""
    inside = (rows[:, None] > cols[None, :]) & (rows < tokens)[:, None] & (cols < tokens)[None, :]
    at = square + rows.to(tl.int64)[:, None] * tokens + cols[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    if AFTER:
        grad = tl.where(tl.load(out_ptr + at, mask=inside, other=0.0) > 0, grad, 0.0)
    return grad


@triton.jit
def gradient_sums_kernel(
    grad_ptr, out_ptr, sums_ptr, tokens, blocks, AFTER: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of F's gradients over each block of queries."""
    block, column, bm = place(blocks, tl.cdiv(tokens, BLOCK_N))
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    square = bm * tokens * tokens
    total = tl.zeros((BLOCK_N,), tl.float32)
    if column * BLOCK_N < (block + 1) * BLOCK_M:
        total = tl.sum(gradients(grad_ptr, out_ptr, square, rows, cols, tokens, AFTER), 0)
    at = (bm * blocks + block) * tokens + cols
    tl.store(sums_ptr + at, total, mask=cols < tokens)


@triton.jit
def sum_backward_kernel(
    q_ptr, k_ptr, bias_ptr, out_ptr, grad_ptr, high_ptr, low_ptr, d_ptr,
    stride_qb, stride_qm, stride_qt, stride_kb, stride_km, stride_kt, masks, tokens, blocks, scale, leak,
    E: tl.constexpr, BIAS: tl.constexpr, BOS: tl.constexpr, OWN: tl.constexpr, LEAKY: tl.constexpr,
    AFTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A tile of the logits' gradient, zeros above the diagonal."""
    block, column, bm = place(blocks, tl.cdiv(tokens, BLOCK_N))
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    square = bm * tokens * tokens
    d_logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if column * BLOCK_N < (block + 1) * BLOCK_M:
        b = bm // masks
        m = bm % masks
        _, logits, counts = attack_tile(
            q_ptr + b * stride_qb + m * stride_qm, k_ptr + b * stride_kb + m * stride_km, bias_ptr + m,
            stride_qt, stride_kt, rows, cols, tokens, scale, leak,
            E, BIAS, BOS, OWN, LEAKY, BLOCK_M, BLOCK_N, BLOCK_E,
        )  # fmt: skip
        at = (bm * blocks + block) * tokens + cols
        high = tl.load(high_ptr + at, mask=cols < tokens, other=0.0)
        low = tl.load(low_ptr + at, mask=cols < tokens, other=0.0)
        grad = gradients(grad_ptr, out_ptr, square, rows, cols, tokens, AFTER)
        behind = high[None, :] + (
            down_columns(grad, True, q_ptr.dtype.element_ty == tl.float32) - grad + low[None, :]
        )
        d_logits = tl.where(logits > 0, behind, 0.0)
        if LEAKY:
            d_logits = tl.where(logits > 0, behind, leak * behind)
        d_logits = tl.where(counts, d_logits, 0.0)
    at = square + rows.to(tl.int64)[:, None] * tokens + cols[None, :]
    tl.store(d_ptr + at, d_logits, mask=(rows < tokens)[:, None] & (cols < tokens)[None, :])


LAUNCH = {"BLOCK_N": 64, "num_warps": 4}


def _offsets(sums: Tensor, *, behind: bool) -> tuple[Tensor, Tensor]:
    batch, masks, blocks, tokens = sums.shape
    high, low = torch.empty_like(sums), torch.empty_like(sums)
    size = max(16, min(64, triton.next_power_of_2(blocks)))
    offsets_kernel[(triton.cdiv(tokens, 32) * batch * masks,)](
        sums, high, low, tokens, blocks, BEHIND=behind, BLOCK_B=size, BLOCK_N=32
    )
    return high, low


def _arguments(q: Tensor, k: Tensor, scale: float, leak: float) -> tuple[float, ...]:
    tokens = q.shape[2]
    return (*strides(q), *strides(k), q.shape[1], tokens, triton.cdiv(tokens, BLOCK_M), scale, leak)


def _options(q: Tensor, bias: Tensor | None, leak: float, bos: bool, own: bool) -> dict[str, int]:
    width = q.shape[-1]
    return LAUNCH | {
        "E": width, "BIAS": bias is not None, "BOS": bos, "OWN": own, "LEAKY": leak != 0,
        "BLOCK_M": BLOCK_M, "BLOCK_E": block_of(width),
    }  # fmt: skip


def _tiles(q: Tensor) -> tuple[int]:
    batch, masks, tokens, _ = q.shape
    return (triton.cdiv(tokens, BLOCK_M) * triton.cdiv(tokens, LAUNCH["BLOCK_N"]) * batch * masks,)


def forward(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, leak: float, bos: bool, own: bool, after: bool
) -> Tensor:
    """F, `(B, M, T, T)`; arguments as `selection_mask` takes them."""
    batch, masks, tokens, _ = q.shape
    sums = q.new_empty((batch, masks, triton.cdiv(tokens, BLOCK_M), tokens), dtype=torch.float32)
    out = q.new_empty((batch, masks, tokens, tokens), dtype=torch.float32)
    arguments, options = _arguments(q, k, scale, leak), _options(q, bias, leak, bos, own)
    inputs = (q, k, q if bias is None else bias)
    block_sums_kernel[_tiles(q)](*inputs, sums, *arguments, **options)
    high, low = _offsets(sums, behind=False)
    sum_kernel[_tiles(q)](*inputs, high, low, out, *arguments, AFTER=after, **options)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scale: float,
    leak: float,
    bos: bool,
    own: bool,
    after: bool,
) -> Tensor:
    """Gradient of the selection logits of F's, `(B, M, T, T)` in q's dtype; `out` is read where `after`."""
    batch, masks, tokens, _ = q.shape
    blocks = triton.cdiv(tokens, BLOCK_M)
    sums = q.new_empty((batch, masks, blocks, tokens), dtype=torch.float32)
    d_logits = torch.empty_like(grad, dtype=q.dtype)
    gradient_sums_kernel[_tiles(q)](grad, out, sums, tokens, blocks, AFTER=after, BLOCK_M=BLOCK_M, **LAUNCH)
    high, low = _offsets(sums, behind=True)
    sum_backward_kernel[_tiles(q)](
        q, k, q if bias is None else bias, out, grad, high, low, d_logits,
        *_arguments(q, k, scale, leak), AFTER=after, **_options(q, bias, leak, bos, own),
    )  # fmt: skip
    return d_logits
