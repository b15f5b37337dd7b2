"""The mask F of selective attention and its gradient, as operators that torch.compile can see past.

Definition in `headwise.functional.selective`; the kernels are in `running_sum` and `protection_game`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.functional.layout import packed
from headwise.functional.selective import kernel_game as protection_game
from headwise.functional.selective import kernel_running_sum as running_sum
from headwise.functional.selective.kernel_tiles import BLOCK_M


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
        q: selection queries `(B, M, T, E)`.
        k: selection keys `(B, M or 1, T, E)`.
        bias: of the logits, `(M,)`.
        guard_q, guard_k: queries and keys of the protecting logits, `(B, M or 1, T, E')`; the selection
            logits themselves protect where both are the same, none where both are absent.
        guard: slope, offset, scale and bias of the protection `relu(scale · relu(slope · logits +
            offset) + bias)`; empty for the plain running sum.
        bos, own: whether the first and the own key are protected.
        after: another ReLU on F; the game has no need of it, where F is at least 0 anyway.

    Returns:
        F `(B, M, T, T)` float32, undefined above the diagonal's blocks; states `(B, M, blocks, T)`.
    """
    q, k = packed(q), packed(k)
    bias, guard_q, guard_k = (x if x is None else packed(x) for x in (bias, guard_q, guard_k))
    if guard:
        return protection_game.forward(
            q, k, bias, (guard_q, guard_k), scale, guard_qk_scale, guard, bos, own
        )  # fmt: skip
    out = running_sum.forward(q, k, bias, scale, leak, bos, own, after)
    return out, q.new_empty((*q.shape[:2], 0, q.shape[2]), dtype=torch.float32)


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
    grad = grad.contiguous()
    q, k = packed(q), packed(k)
    bias, guard_q, guard_k = (x if x is None else packed(x) for x in (bias, guard_q, guard_k))
    if guard:
        guards = (guard_q, guard_k)
        return protection_game.backward(
            grad, q, k, bias, guards, state, scale, guard_qk_scale, guard, bos, own
        )  # fmt: skip
    return running_sum.backward(grad, q, k, bias, out, scale, leak, bos, own, after), q.new_empty(0)


@selection_mask_backward.register_fake
def _(grad, q, k, bias, guard_q, guard_k, out, state, *settings):
    d_guard = q.new_empty(grad.shape if guard_q is not None else 0)
    return q.new_empty(grad.shape), d_guard


def _save(ctx, inputs, output):
    q, k, bias, guard_q, guard_k, *settings = inputs
    out, state = output
    ctx.mark_non_differentiable(state)
    ctx.settings = settings
    ctx.save_for_backward(q, k, bias, guard_q, guard_k, out if settings[-1] else out.new_empty(0), state)


def _backward(ctx, grad, _):
    q, k, bias, guard_q, guard_k, out, state = ctx.saved_tensors
    scale, guard_qk_scale = ctx.settings[:2]
    d_logits, d_guard = selection_mask_backward(grad, q, k, bias, guard_q, guard_k, out, state, *ctx.settings)
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
