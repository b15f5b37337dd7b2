"""Change what one attention layer computes with, for the length of a block: its queries, its heads' outputs.

In a headwise model the layer's own `rotated` and `attend` are wrapped. In a Hugging Face model the
function that transformers' attention interface gives to the layer is; queries are then seen after
the rotation, which makes no difference to scaling one: `rope(s·q) = s·rope(q)`.

Enter `watch` (or `attached`) first and `changed` inside it, and the changed queries are what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention.base import Attention
from headwise.errors import HeadwiseError

ALIGNED = 64
"""Elements after which a tensor's beginning is as aligned as its storage's, for any kernel."""

Change = Callable[[Tensor], Tensor]
Look = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Changes:
    """What to do in one layer.

    Attributes:
        query: `(B, H, T, D)` to the same shape.
        output: heads' outputs before the output projection, `(B, H, T, D)` to the same shape.
        look: is shown q, k, v as attention uses them.
    """

    query: Change | None = None
    output: Change | None = None
    look: Look | None = None


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model that has been seen to run."""

    number: int
    module: nn.Module
    n_heads: int


@contextmanager
def changed(layer: Layer, changes: Changes) -> Iterator[None]:
    """Apply `changes` to `layer` inside the block; afterwards, also after an exception, it is as before."""
    module = layer.module
    with _in_headwise(module, changes) if isinstance(module, Attention) else _in_interface(module, changes):
        yield


@torch.no_grad()
def attention_layers(model: nn.Module, forward: Callable[[Tensor], Any], tokens: Tensor) -> list[Layer]:
    """The attention layers of `model`, numbered as `watch` numbers them.

    Args:
        forward: runs the model.
        tokens: a few ids `(B, T)` to run it on.

    Raises:
        HeadwiseError: no layer computes attention where it can be changed, or layers share a module.
    """
    own = [module for module in model.modules() if isinstance(module, Attention)]
    if own:
        return [Layer(i, module, module.shape.n_heads) for i, module in enumerate(own)]
    from headwise.watch.huggingface import Call, listening
    from headwise.watch.layers import attention_modules, layer_numbers

    modules = attention_modules(model)
    numbers = layer_numbers(modules)
    found: dict[nn.Module, Layer] = {}

    def note(module: nn.Module, call: Call) -> None:
        if module in modules and module not in numbers:  # cross-attention
            return
        if module in found:
            raise HeadwiseError(
                f"{type(model).__name__} runs one attention module as several layers, so a head of one of "
                "them cannot be changed alone"
            )
        number = numbers.setdefault(module, max(numbers.values(), default=-1) + 1)
        found[module] = Layer(number, module, call.q.shape[1])

    with listening(model, note):
        forward(tokens)
    if not found:
        raise HeadwiseError(
            f"{type(model).__name__} computes attention without transformers' attention interface, "
            "so its heads cannot be changed"
        )
    return sorted(found.values(), key=lambda layer: layer.number)


def find_layer(layers: list[Layer], number: int, head: int) -> Layer:
    """The layer of that number, which must have that head.

    Raises:
        HeadwiseError: it says which layers or heads there are.
    """
    known = {layer.number: layer for layer in layers}
    if number not in known:
        raise HeadwiseError(f"there is no layer {number}; this model has layers {_range(sorted(known))}")
    layer = known[number]
    if not 0 <= head < layer.n_heads:
        raise HeadwiseError(f"layer {number} has no head {head}; it has heads 0 to {layer.n_heads - 1}")
    return layer


def scale_head(head: int, scale: float) -> Change:
    """Multiply one head's queries; all others stay the same bits, and so do all at a scale of 1."""

    def change(q: Tensor) -> Tensor:
        q = copied_as_laid_out(q)
        q[:, head] *= scale
        return q

    return change


def copied_as_laid_out(x: Tensor) -> Tensor:
    """A copy with the strides and the alignment of `x`, be it a slice of a fused projection.

    Which kernel attends may depend on both, and another kernel rounds otherwise: a compact copy of
    the same values could change the output.
    """
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    offset = x.storage_offset() % ALIGNED
    return x.new_empty(offset + span).as_strided(x.shape, x.stride(), offset).copy_(x)


@contextmanager
def _in_headwise(module: Attention, changes: Changes) -> Iterator[None]:
    rotated, attend = module.rotated, module.attend

    @wraps(rotated)
    def changed_rotated(*args: Any) -> tuple[Tensor, Tensor]:
        q, k = rotated(*args)
        return q if changes.query is None else changes.query(q), k

    @wraps(attend)
    def changed_attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if changes.look is not None:
            changes.look(q, k, v)
        y = attend(x, q, k, v, **options)
        return y if changes.output is None else changes.output(y)

    with ExitStack() as stack:
        stack.enter_context(replaced(module, "rotated", changed_rotated))
        stack.enter_context(replaced(module, "attend", changed_attend))
        yield


@contextmanager
def replaced(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Set `method` on this one instance."""
    before = module.__dict__.get(name)
    module.__dict__[name] = method
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


@contextmanager
def _in_interface(module: nn.Module, changes: Changes) -> Iterator[None]:
    from transformers.modeling_utils import AttentionInterface

    get_interface, getitem = AttentionInterface.get_interface, AttentionInterface.__getitem__
    mark = object()

    def wrapped(attend: Callable[..., Any]) -> Callable[..., Any]:
        already: frozenset[object] = getattr(attend, "changed_by", frozenset())
        if mark in already:  # get_interface looks functions up through __getitem__
            return attend

        @wraps(attend)
        def attend_changed(
            layer: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            **options: Any,
        ) -> Any:
            if layer is not module:
                return attend(layer, query, key, value, attention_mask, **options)
            q = query if changes.query is None else changes.query(query)
            if changes.look is not None:
                changes.look(q, key, value)
            y, weights = attend(layer, q, key, value, attention_mask, **options)
            if changes.output is not None:  # the interface returns (B, T, H, D)
                y = changes.output(y.transpose(1, 2)).transpose(1, 2).contiguous()
            return y, weights

        attend_changed.changed_by = already | {mark}  # type: ignore[attr-defined]
        return attend_changed

    def get_changed(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return wrapped(get_interface(self, name, default))

    def getitem_changed(self: Any, name: str) -> Callable[..., Any]:
        return wrapped(getitem(self, name))

    setattr(AttentionInterface, "get_interface", get_changed)  # noqa: B010 - mypy knows it as a method
    setattr(AttentionInterface, "__getitem__", getitem_changed)  # noqa: B010
    try:
        yield
    finally:
        setattr(AttentionInterface, "get_interface", get_interface)  # noqa: B010
        setattr(AttentionInterface, "__getitem__", getitem)  # noqa: B010


def _range(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
