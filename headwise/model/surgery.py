"""Head surgery: add a head to every layer of a trained model, as the selective attention log did.

The new head comes first (index 0, whose logits some kinds read for all heads) or last, as the
model itself would draw it: normal, its output columns narrower by √(2·n_layers). Then its init applies:

    normal      as drawn
    zero        queries, keys, values and output columns are 0
    o_zero      its output columns are 0
    k_zero      its keys are 0
    ko_zero     both
    o_rescaled  its output columns are divided by 5

Its biases are 0 whichever. Where each query head has a key/value head, the new one gets its own; where all
share one, the new one shares it too. In between no single head can be added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.attention import attention_kind
from headwise.attention.modifiers import layer as modifiers
from headwise.errors import HeadwiseError, one_of
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder

INITS = ("normal", "zero", "ko_zero", "o_zero", "k_zero", "o_rescaled")
PLACES = ("start", "end")
RESCALED = 5.0

Inserted = dict[int, list[tuple[int, int]]]
"""What is new in a tensor: along each axis the ranges `[start, stop)` that the smaller one lacks."""


@dataclass(frozen=True)
class Operation:
    """One head more in every layer of `before`.

    Attributes:
        before: the model that is operated on; its sizes count, its kind of attention does not.
        after: what it becomes, as `grown` and possibly with another kind of attention.
        place: start or end.
        init: one of `INITS`.
    """

    before: ModelConfig
    after: ModelConfig
    place: str
    init: str

    @property
    def index(self) -> int:
        """Where the new head is among the new model's."""
        return 0 if self.place == "start" else self.before.n_heads

    @property
    def shares_keys(self) -> bool:
        """Whether the new head uses the one key/value head there is."""
        return self.after.kv_heads() == self.before.kv_heads()

    def rows(self) -> dict[str, tuple[int, int]]:
        """The new head's rows of the fused projection, by part: q, and k and v where it has its own."""
        width, heads, kv_heads = self.after.width_of_head(), self.after.n_heads, self.after.kv_heads()
        attention = self.after.attention
        wide = attention_kind(attention.kind).query_width(width, attention.options())
        first = {"q": (self.index * wide, wide)}
        if not self.shares_keys:
            keys = heads * wide
            first |= {"k": (keys + self.index * width, width)}
            first |= {"v": (keys + (kv_heads + self.index) * width, width)}
        return {part: (at, at + size) for part, (at, size) in first.items()}

    def columns(self) -> tuple[int, int]:
        """The new head's columns of the output projection."""
        width = self.after.width_of_head()
        return self.index * width, (self.index + 1) * width

    def inserted(self, leaf: str) -> Inserted:
        """What of an attention's parameter `leaf` is new."""
        if leaf in ("qkv.weight", "qkv.bias"):
            return {0: list(self.rows().values())}
        if leaf == "out.weight":
            return {1: [self.columns()]}
        return own_ranges(self.after, leaf, self.index)


def own_ranges(config: ModelConfig, leaf: str, index: int) -> Inserted:
    """Where head `index` lies in a parameter that its kind or a modifier adds to the projections."""
    attention = config.attention
    if leaf.startswith("modifiers."):
        own = leaf.removeprefix("modifiers.")
        return modifiers.head_ranges(own, index, attention.modifiers(0), config.width_of_head())
    return attention_kind(attention.kind).head_ranges(leaf, index, attention.options())


def refuse(config: ModelConfig, init: str, source: str) -> None:
    """Refuse an operation that cannot be.

    Raises:
        HeadwiseError: an unknown init, a kind whose heads are fixed, key/value heads that several but not
            all heads share, or keys to zero where the new head has none of its own.
    """
    one_of("--init", init, INITS)
    refuse_fixed_heads(config, source)
    heads, kv_heads = config.n_heads, config.kv_heads()
    if config.heads_by_layer is not None:
        raise HeadwiseError(
            f"the layers of {source} have {', '.join(map(str, config.heads_by_layer))} heads; a head can be "
            "added where all layers have the same number"
        )
    if kv_heads not in (1, heads):
        raise HeadwiseError(
            f"{source} has {heads} query heads on {kv_heads} key/value heads: {heads + 1} query heads cannot "
            "share them equally; a head can be added where model.n_kv_heads is model.n_heads or 1"
        )
    if kv_heads < heads and init in ("k_zero", "ko_zero"):
        raise HeadwiseError(
            f"--init {init}: the heads of {source} share one key/value head, and so will the new one: it has "
            "no key of its own to zero; use o_zero or zero"
        )


def refuse_fixed_heads(config: ModelConfig, source: str) -> None:
    """Refuse a model whose heads can neither be added nor be taken out.

    Raises:
        HeadwiseError: its kind says why.
    """
    attention = config.attention
    if reason := attention_kind(attention.kind).heads_are_fixed(attention.options()):
        raise HeadwiseError(f"{source}: no head can be added or taken out: {reason}")


def grown(config: ModelConfig) -> ModelConfig:
    """`config` with one head more of the same width, which is explicit from now on."""
    own_keys = config.kv_heads() == config.n_heads
    kv_heads = config.n_kv_heads + 1 if own_keys and config.n_kv_heads else config.n_kv_heads
    return dataclasses.replace(
        config, n_heads=config.n_heads + 1, n_kv_heads=kv_heads, head_dim=config.width_of_head()
    )


def initial(model: Decoder, operation: Operation) -> dict[str, Tensor]:
    """The parameters of a freshly drawn `model`, with the new head's as its init says."""
    init = operation.init
    fresh = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    low, high = operation.columns()
    for layer in range(operation.after.n_layers):
        qkv, out = (fresh[f"blocks.{layer}.attention.{leaf}.weight"] for leaf in ("qkv", "out"))
        for part, (start, stop) in operation.rows().items():
            if init == "zero" or (part == "k" and init in ("k_zero", "ko_zero")):
                qkv[start:stop] = 0
        if init in ("zero", "o_zero", "ko_zero"):
            out[:, low:high] = 0
        elif init == "o_rescaled":
            out[:, low:high] /= RESCALED
    return fresh


def grow(
    weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor], operation: Operation, source: str
) -> dict[str, Tensor]:
    """`fresh` with `weights` in the place of all that is not new.

    Args:
        weights: by parameter of the model before, or of an optimizer's slot.
        fresh: by parameter of the model after; those that `weights` lacks stay.
        source: where `weights` are from, for errors.

    Raises:
        HeadwiseError: names the first parameter that does not fit.
    """
    unknown = next((name for name in weights if name not in fresh), None)
    if unknown:
        raise HeadwiseError(f"{source} is from another configuration: the new model has no {unknown}")
    result = {}
    for name, value in fresh.items():
        if name not in weights:
            result[name] = value
            continue
        inserted = operation.inserted(name.rpartition(".attention.")[2]) if ".attention." in name else {}
        expected = tuple(
            size - sum(stop - start for start, stop in inserted.get(axis, []))
            for axis, size in enumerate(value.shape)
        )
        if tuple(weights[name].shape) != expected:
            raise HeadwiseError(
                f"{source} is from another configuration: {name} is {tuple(weights[name].shape)} there and "
                f"{expected} here before the head is added"
            )
        result[name] = _graft(weights[name].to(value.dtype), value, inserted)
    return result


def shrink(weights: Mapping[str, Tensor], operation: Operation) -> dict[str, Tensor]:
    """`weights` of the model after without the head that was added: the inverse of `grow`.

    Args:
        weights: by parameter of the model after.
    """
    return without(weights, lambda layer, leaf: operation.inserted(leaf))


def without(weights: Mapping[str, Tensor], places: Callable[[int, str], Inserted]) -> dict[str, Tensor]:
    """`weights` less what `places` gives for a layer and a parameter of its attention."""
    result = {}
    for name, value in weights.items():
        stem, attends, leaf = name.rpartition(".attention.")
        taken = places(int(stem.rpartition(".")[2]), leaf) if attends else {}
        for axis, ranges in taken.items():
            value = value.index_select(axis, _others(value.shape[axis], ranges).to(value.device))
        result[name] = value
    return result


def _others(size: int, ranges: list[tuple[int, int]]) -> Tensor:
    """The indices below `size` outside of all ranges."""
    kept = torch.ones(size, dtype=torch.bool)
    for start, stop in ranges:
        kept[start:stop] = False
    return kept.nonzero().flatten()


def _graft(old: Tensor, fresh: Tensor, inserted: Inserted) -> Tensor:
    """`fresh` with `old` everywhere but in what is inserted."""
    if not inserted:
        return old.clone()
    (axis, ranges), *rest = inserted.items()
    index = _others(fresh.shape[axis], ranges).to(fresh.device)
    return fresh.index_copy(axis, index, _graft(old, fresh.index_select(axis, index), dict(rest)))
