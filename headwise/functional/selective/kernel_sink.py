"""Causal softmax attention under F and a sink, by the kernels that know no sink.

As in `headwise.functional.fused_attention`: with the output and the log-sum-exp of the softmax that has one
more logit, the backward kernels compute that softmax's gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headwise.functional.fused_attention.kernel import apply_sink, sink_gradient
from headwise.functional.selective.kernel_masked import (
    masked_attention,
    masked_attention_backward,
    output_like,
)

LN2 = math.log(2)


@torch.library.custom_op("headwise::masked_attention_with_sink", mutates_args=())
def masked_attention_with_sink(
    q: Tensor, k: Tensor, v: Tensor, taken: Tensor, sink: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention under F and a sink.

    Args:
        q, k, v, taken, scale: as of `masked_attention`.
        sink: logits `(H,)`.

    Returns:
        y `(B, H, T, D)`, laid out `(B, T, H, D)`; the log-sum-exp of each query in base 2, `(B, H, T)`.
    """
    y, lse = masked_attention(q, k, v, taken, scale)
    y, lse = apply_sink(y, lse * LN2, sink)
    return y, lse / LN2


@masked_attention_with_sink.register_fake
def _(q, k, v, taken, sink, scale):
    return output_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("headwise::masked_attention_sink_gradient", mutates_args=())
def _sink_gradient(y: Tensor, grad: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    return sink_gradient(y, grad, lse * LN2, sink)


@_sink_gradient.register_fake
def _(y, grad, lse, sink):
    return lse.new_empty(sink.shape)


def _save(ctx, inputs, output):
    q, k, v, taken, sink, ctx.scale = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, taken, y, lse, sink)


def _backward(ctx, grad, _):
    *saved, y, lse, sink = ctx.saved_tensors
    gradients = masked_attention_backward(grad, *saved, y, lse, ctx.scale)
    return *gradients, _sink_gradient(y, grad, lse, sink).to(sink.dtype), None


masked_attention_with_sink.register_autograd(_backward, setup_context=_save)
