"""The contraction as operators of PyTorch: with gradients, and opaque to `torch.compile`.

Declared through `torch.library.Library`: the first call of a `custom_op` would import the compiler, which
takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from headwise.functional.tensor_train import contraction
from headwise.functional.tensor_train.contraction import backward_products, plan_of
from headwise.functional.tensor_train.decomposition import check_cores

LIBRARY = torch.library.Library("headwise_tensor_train", "DEF")
LIBRARY.define("forward(Tensor x, Tensor[] cores, int out_features, int[]? order) -> Tensor")
LIBRARY.define(
    "backward(Tensor grad, Tensor x, Tensor[] cores, int[]? order, bool of_x) -> (Tensor, Tensor[])"
)

Order = list[int] | None
Gradients = tuple[Tensor, list[Tensor]]


def tensor_train_linear(
    x: Tensor, cores: Sequence[Tensor], out_features: int, *, order: Sequence[int] | None = None
) -> Tensor:
    """`W x` with W in tensor-train form (Novikov et al. 2015), in the cheapest order.

    Keeps x and the cores for the backward pass, and nothing else; first derivatives only. Computes in the
    dtype of x and the cores, also under autocast.

    Args:
        x: `(…, N)`, floating-point; zeros pad it to Π n_k.
        cores: `(r_{k-1}, m_k, n_k, r_k)`, of x's dtype and device.
        out_features: M, at most Π m_k; what is beyond it is cut off.
        order: in which the cores are contracted, other than the cheapest.

    Returns:
        `(…, M)`.

    Raises:
        ValueError: cores that do not meet, or sizes that do not fit them.
    """
    tokens = x.reshape(-1, x.shape[-1])
    chosen = None if order is None else list(order)
    y: Tensor = torch.ops.headwise_tensor_train.forward(tokens, list(cores), out_features, chosen)
    return y.view(*x.shape[:-1], out_features)


def _check(x: Tensor, cores: list[Tensor], out_features: int) -> None:
    check_cores(cores)
    inputs, outputs = (math.prod(core.shape[axis] for core in cores) for axis in (2, 1))
    if x.shape[1] > inputs or not 0 < out_features <= outputs:
        raise ValueError(
            f"x has {x.shape[1]} features and out_features is {out_features}; "
            f"cores are of a {outputs} x {inputs} matrix"
        )


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def _forward(x: Tensor, cores: list[Tensor], out_features: int, order: Order) -> Tensor:
    _check(x, cores, out_features)
    with _without_autocast(x.device.type):
        return contraction.forward(x, cores, out_features, plan_of([core.shape for core in cores], order))


def _forward_room(x: Tensor, cores: list[Tensor], out_features: int, order: Order) -> Tensor:
    _check(x, cores, out_features)
    return x.new_empty(x.shape[0], out_features)


def _backward(grad: Tensor, x: Tensor, cores: list[Tensor], order: Order, of_x: bool) -> Gradients:
    with _without_autocast(x.device.type):
        chosen = plan_of([core.shape for core in cores], order)
        dx, found = contraction.backward(grad, x, cores, chosen, of_x=of_x)
    return x.new_empty(0) if dx is None else dx, found


def _backward_room(grad: Tensor, x: Tensor, cores: list[Tensor], order: Order, of_x: bool) -> Gradients:
    return x.new_empty(x.shape if of_x else 0), [core.new_empty(core.shape) for core in cores]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cores, _, ctx.order = inputs
    ctx.save_for_backward(x, *cores)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *cores = ctx.saved_tensors
    of_x = ctx.needs_input_grad[0]
    dx, found = torch.ops.headwise_tensor_train.backward(grad, x, cores, ctx.order, of_x)
    return dx if of_x else None, found, None, None


def _refuse(*_: Any) -> None:
    raise RuntimeError("a tensor-train product has first derivatives only")


COMPUTE: dict[str, Callable[..., Any]] = {"forward": _forward, "backward": _backward}
"""What the operators do."""

for _name, _room in (("forward", _forward_room), ("backward", _backward_room)):
    LIBRARY.impl(_name, COMPUTE[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"headwise_tensor_train::{_name}", _room, lib=LIBRARY)
torch.library.register_autograd(
    "headwise_tensor_train::forward", _gradients, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd("headwise_tensor_train::backward", _refuse, lib=LIBRARY)

Shapes = Sequence[Sequence[int]]


def _forward_flops(x: Sequence[int], cores: Shapes, out_features: int, order: Order, out_shape: Any) -> int:
    return 2 * x[0] * plan_of(cores, order).products


def _backward_flops(
    grad: Any, x: Sequence[int], cores: Shapes, order: Order, of_x: bool, out_shape: Any
) -> int:
    return 2 * x[0] * backward_products(plan_of(cores, order), of_x=of_x)


FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.headwise_tensor_train.forward: _forward_flops,
    torch.ops.headwise_tensor_train.backward: _backward_flops,
}
"""For torch's FlopCounterMode, which does not see the products inside the operators."""
