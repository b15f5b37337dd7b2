"""Tropical attention as operators of PyTorch: with gradients, and whole under `torch.compile`.

Declared through `torch.library.Library`: the first call of a `custom_op` would import the compiler, which
takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwise.functional.tropical import chunked

LIBRARY = torch.library.Library("headwise_tropical", "DEF")
LIBRARY.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor? bias, bool causal, bool keep, bool margin, bool fused)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "backward(Tensor grad, Tensor? grad_top, Tensor q, Tensor k, Tensor winner, Tensor top_winner,"
    " bool fused) -> (Tensor, Tensor, Tensor)"
)

Winners = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, keep: bool, margin: bool, fused: bool
) -> Winners:
    """The fields of `chunked.Best`; arguments as of `chunked.forward`, of one dtype.

    Args:
        fused: use the kernel where there is no bias.
    """
    found: Winners = torch.ops.headwise_tropical.forward(q, k, v, bias, causal, keep, margin, fused)
    return found


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, keep: bool, margin: bool, fused: bool
) -> Winners:
    if fused and bias is None:
        from headwise.functional.tropical.kernel import forward as kernel

        return kernel(q, k, v, causal=causal, keep=keep, margin=margin)
    return chunked.forward(q, k, v, bias, causal=causal, keep=keep, margin=margin)


def _forward_room(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, causal: bool, keep: bool, margin: bool, fused: bool
) -> Winners:
    return chunked.room(q, keep, margin)


def _backward(
    grad: Tensor,
    grad_top: Tensor | None,
    q: Tensor,
    k: Tensor,
    winner: Tensor,
    top_winner: Tensor,
    fused: bool,
) -> Gradients:
    if fused:
        from headwise.functional.tropical.kernel_backward import backward as kernel

        return kernel(grad, grad_top, q, k, winner, top_winner)
    return chunked.backward(grad, grad_top, q, k, winner, top_winner)


def _backward_room(grad: Tensor, grad_top: Any, q: Tensor, k: Tensor, *_: Any) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Winners) -> None:
    q, k, *_, ctx.fused = inputs
    _, _, winner, top_winner, margin = output
    ctx.mark_non_differentiable(winner, top_winner, margin)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, winner, top_winner)


def _gradients(ctx: Any, grad: Tensor | None, grad_top: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, winner, top_winner = ctx.saved_tensors
    if grad is None and grad_top is None:
        return (None,) * 8
    if grad is None:
        grad = torch.zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    given = torch.ops.headwise_tropical.backward(grad, grad_top, q, k, winner, top_winner, ctx.fused)
    return *given, *[None] * 5


for _name, _compute, _room in (
    ("forward", _forward, _forward_room),
    ("backward", _backward, _backward_room),
):
    LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"headwise_tropical::{_name}", _room, lib=LIBRARY)
torch.library.register_autograd("headwise_tropical::forward", _gradients, setup_context=_save, lib=LIBRARY)


def _forward_flops(q: torch.Size, k: torch.Size, *_: Any, out_shape: Any = None) -> int:
    """A sum and a maximum for each (query, key, channel) of the scores, and again of the values."""
    batch, heads, tokens, width = q
    return 4 * batch * heads * tokens * k[2] * width


def _backward_flops(grad: torch.Size, grad_top: Any, q: torch.Size, *_: Any, out_shape: Any = None) -> int:
    """A sum and a maximum for each channel of the score of each winner, which finds that score's winner."""
    batch, heads, tokens, width = q
    return 2 * batch * heads * tokens * (width + (grad_top is not None)) * width


FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.headwise_tropical.forward: _forward_flops,
    torch.ops.headwise_tropical.backward: _backward_flops,
}
"""For torch's FlopCounterMode: a sum and a maximum are two operations, as a product and a sum are."""
