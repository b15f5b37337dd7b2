"""Heads taken out of a trained model: smaller matrices, and layers that may then differ in heads.

What leaves together is a unit. Where each query head has a key/value head of its own, or all share one, a
unit is a query head (with its own key/value head where it has one). Where several share one of several, a
unit is a key/value head with all query heads that it serves: the others serve as many as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from headwise.attention import attention_kind
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.surgery import Inserted, own_ranges, refuse_fixed_heads, without

Removed = Mapping[int, Sequence[int]]
"""Query heads by layer."""


def unit_size(config: ModelConfig) -> int:
    """Query heads that leave together, the same in every layer: one that was pruned to a single key/value
    head cannot lose a part of what it serves, since the layers share one ratio."""
    return 1 if config.kv_heads() == 1 else config.heads_that_share()


def refuse(config: ModelConfig, source: str) -> None:
    """Refuse a model whose heads cannot be taken out one by one.

    Raises:
        HeadwiseError: its kind has no single heads, or heads act on one another, in a layer or across them.
    """
    refuse_fixed_heads(config, source)
    attention = config.attention
    if attention.value_residual and config.kv_heads() > 1:
        raise HeadwiseError(
            f"{source} has model.attention.value_residual, under which each key/value head of a later layer "
            "reads the values of the same one in the first layer: without a head these would be another's; "
            "pass --zero, which leaves the head in place and takes its output"
        )
    if attention_kind(attention.kind).heads_interact(attention.options()):
        raise HeadwiseError(
            f"{source} has attention kind {attention.kind!r}, whose heads act on one another: without a head "
            "the others would compute something else; pass --zero, which leaves the head in place and takes "
            "its output"
        )


def pruned(config: ModelConfig, removed: Removed) -> ModelConfig:
    """The model without the heads of `removed`, whole units of each layer."""
    shapes = [config.heads_of(layer) for layer in range(config.n_layers)]
    left = [heads - len(removed.get(layer, ())) for layer, (heads, _) in enumerate(shapes)]
    width = config.width_of_head()
    if len(set(left)) > 1:
        return dataclasses.replace(config, heads_by_layer=left, head_dim=width)
    kv_heads = 1 if config.kv_heads() == 1 else left[0] // config.heads_that_share()
    given = kv_heads if config.n_kv_heads else None
    return dataclasses.replace(config, n_heads=left[0], n_kv_heads=given, heads_by_layer=None, head_dim=width)


def prune(weights: Mapping[str, Tensor], config: ModelConfig, removed: Removed) -> dict[str, Tensor]:
    """`weights` of a model of `config` without the heads of `removed`: those of `pruned(config, removed)`."""
    return without(weights, lambda layer, leaf: _places(config, layer, removed.get(layer, ()), leaf))


def zero(weights: Mapping[str, Tensor], config: ModelConfig, removed: Removed) -> dict[str, Tensor]:
    """`weights` with the columns of the output projection at 0 that read a head of `removed`.

    Raises:
        HeadwiseError: the kind's output projection is not a matrix with columns for each head.
    """
    result, width = dict(weights), config.width_of_head()
    for layer, heads in removed.items():
        name = f"blocks.{layer}.attention.out.weight"
        expected = (config.d_model, config.heads_of(layer)[0] * width)
        if name not in weights or tuple(weights[name].shape) != expected:
            raise no_slices(config)
        result[name] = weights[name].clone()
        for head in heads:
            result[name][:, head * width : (head + 1) * width] = 0
    return result


def no_slices(config: ModelConfig) -> HeadwiseError:
    """The error for a kind whose parameters have no part for each head."""
    return HeadwiseError(
        f"attention kind {config.attention.kind!r} keeps no separate weights for each head, so a head cannot "
        "be removed from them"
    )


def _places(config: ModelConfig, layer: int, heads: Sequence[int], leaf: str) -> Inserted:
    """Where `heads` lie in an attention's parameter `leaf`: along each axis ranges `[start, stop)`."""
    if not heads:
        return {}
    (n_heads, kv_heads), width = config.heads_of(layer), config.width_of_head()
    attention = config.attention
    wide = attention_kind(attention.kind).query_width(width, attention.options())
    if leaf == "out.weight":
        return {1: [(head * width, (head + 1) * width) for head in heads]}
    if leaf in ("qkv.weight", "qkv.bias"):
        own = [(head * wide, (head + 1) * wide) for head in heads]
        size = unit_size(config)
        gone = [] if kv_heads < n_heads and kv_heads == 1 else sorted({head // size for head in heads})
        starts = [n_heads * wide + (part * kv_heads + at) * width for part in (0, 1) for at in gone]
        return {0: own + [(start, start + width) for start in starts]}
    found: dict[int, list[tuple[int, int]]] = {}
    for head in heads:
        for axis, ranges in own_ranges(config, leaf, head).items():
            found.setdefault(axis, []).extend(ranges)
    return found
