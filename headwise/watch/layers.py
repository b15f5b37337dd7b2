"""The attention layers of a transformers model: which modules they are, their numbers, their keys' source."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any

from torch import Tensor, nn

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""The name under which transformers' model files know the attention interface."""
SOURCES = frozenset({
    "key_value_states", "encoder_hidden_states", "encoder_states", "cross_attention_states", "kv_states",
    "vision_hidden_states", "image_hidden_states", "key_states", "key", "keys", "memory", "context", "source",
})  # fmt: skip
"""Parameters of attention modules that hold what keys are made of, where it is not the queries' states."""
CROSS = ("crossattention", "encdecattention", "encoderattn", "crossattn", "encoderattention")


def attention_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Every module whose class computes attention through the interface, to its name, in the tree's order."""
    names = {module: name.replace("_orig_mod.", "") for name, module in model.named_modules()}
    kinds: dict[nn.Module, Any] = {module: type(module) for module in names}
    return {module: name for module, name in names.items() if _uses_interface(kinds[module])}


def other_attention(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that attend by their class's name, and have no way to the interface, to their names."""
    known = attention_modules(model)
    found = {}
    for name, module in model.named_modules():
        inside = [m for m in module.modules() if "Attention" in type(m).__name__ or m in known]
        if inside == [module] and module not in known and any(True for _ in module.parameters()):
            found[module] = name.replace("_orig_mod.", "")
    return found


def layer_numbers(modules: dict[nn.Module, str]) -> dict[nn.Module, int]:
    """A number for each self-attention layer, before the model has run.

    The layers' own indices where all have one and no two the same; otherwise their order in the model.
    Layers built as cross-attention are left out.
    """
    layers = [module for module, name in modules.items() if not _built_as_cross(module, name)]
    own = [getattr(module, "layer_idx", None) for module in layers]
    if all(type(index) is int for index in own) and len(set(own)) == len(own):
        return dict(zip(layers, (int(index) for index in own if index is not None), strict=True))
    return {module: n for n, module in enumerate(layers)}


def argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The argument of that name in a call of `module`, None where it is left out; empty: it takes none."""
    kind: Any = type(module)
    names = _parameters(kind)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [given.get(name)] if name in names or name in given else []


def source_of_keys(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The argument that a cross-attention call makes its keys of; None for self-attention."""
    kind: Any = type(module)
    names = _parameters(kind)
    given = dict(zip(names, args, strict=False)) | {n: x for n, x in kwargs.items() if n in names}
    queries = next((x for x in given.values() if isinstance(x, Tensor)), None)
    for name, value in given.items():
        if name in SOURCES and isinstance(value, Tensor) and not _same(value, queries):
            return name
    return "another sequence" if getattr(module, "is_cross_attention", False) is True else None


def _same(a: Tensor, b: Tensor | None) -> bool:
    if b is None or a is b:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _built_as_cross(module: nn.Module, name: str) -> bool:
    if getattr(module, "is_cross_attention", False) is True:
        return True
    words = (type(module).__name__, *name.split(".")[-2:])
    return any(mark in word.lower().replace("_", "") for word in words for mark in CROSS)


@cache
def _parameters(kind: Any) -> tuple[str, ...]:
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


@cache
def _uses_interface(kind: Any) -> bool:
    """Whether a method of the class looks a function up in the attention interface."""
    if any(base.__name__ == "PreTrainedModel" for base in kind.__mro__):
        return False  # it looks implementations up to check them
    methods = (value for base in kind.__mro__ if base is not nn.Module for value in vars(base).values())
    return any(INTERFACE in code.co_names for method in methods for code in _codes(method))


def _codes(method: Any) -> Iterator[CodeType]:
    code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
    waiting = [code] if isinstance(code, CodeType) else []
    while waiting:
        yield (code := waiting.pop())
        waiting += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
