"""Norm and rotation as one operator of PyTorch, for `torch.compile`, which would make several passes of them.

Declared through `torch.library.Library`: the first call of a `custom_op` would import the compiler, which
takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.functional.layout import room_by_token

LIBRARY = torch.library.Library("headwise_rotation", "DEF")
LIBRARY.define("forward(Tensor x, Tensor cos, Tensor sin, Tensor weight, float epsilon) -> Tensor")
LIBRARY.define(
    "backward(Tensor grad, Tensor x, Tensor cos, Tensor sin, Tensor weight, float epsilon)"
    " -> (Tensor, Tensor)"
)


def rotated_after_norm(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `headwise.functional.rotation.rotated` with tables and a weight, of an x that the kernel takes."""
    found: Tensor = torch.ops.headwise_rotation.forward(x, cos, sin, weight, epsilon)
    return found


def _forward(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    from headwise.functional.rotation.kernel_apply import forward

    return forward(x, cos, sin, weight, epsilon)


def _backward(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    from headwise.functional.rotation.kernel_apply import backward

    dx, d_weight = backward(grad, x, cos, sin, weight, epsilon)
    assert d_weight is not None
    return dx, d_weight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.epsilon = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, d_weight = torch.ops.headwise_rotation.backward(grad, *ctx.saved_tensors, ctx.epsilon)
    return dx, None, None, d_weight, None


for name, function in (("forward", _forward), ("backward", _backward)):
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
torch.library.register_fake(
    "headwise_rotation::forward", lambda x, cos, sin, weight, epsilon: room_by_token(x), lib=LIBRARY
)
torch.library.register_fake(
    "headwise_rotation::backward",
    lambda grad, x, cos, sin, weight, epsilon: (room_by_token(x), torch.empty_like(weight)),
    lib=LIBRARY,
)
torch.library.register_autograd("headwise_rotation::forward", _gradients, setup_context=_keep, lib=LIBRARY)
