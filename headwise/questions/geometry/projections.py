"""Every head's W_Q, W_K, W_V, W_O from any checkpoint, read from its weights without running it.

Where attention is, is told by the tensors' names (`places.py`); what it is, by the configuration and the
classes of transformers (`architecture.py`): head counts, which layers are softmax attention, how fused
projections are laid out (`layouts.py`). What is not covered is listed with the reason.

Biases and rotary embeddings are left out: `q·k` of a pair of tokens also depends on both, the
circuit `W_Kᵀ W_Q` describes what is left (with RoPE: a query and a key at the same position).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headwise.attention.base import Attention
from headwise.errors import HeadwiseError, one_of
from headwise.questions.geometry.architecture import Architecture
from headwise.questions.geometry.cut import LayerWeights, cut, fused_role
from headwise.questions.geometry.layouts import layout_of
from headwise.questions.geometry.places import CROSS, NORM, Place, find_places, projection_of
from headwise.watch.tensors import Tensors, find, tensors_of_folder, tensors_of_module

Array = NDArray[np.float32]

NORMS = (
    "input_layernorm", "attention_norm", "ln_1", "ln_attn", "norm_1", "norm1", "attn_norm",
    "layernorm_before", "layer_norm1", "attention_layernorm", "attention.LayerNorm", "layer.0.layer_norm",
)  # fmt: skip
"""Norms whose output enters the projections."""
NORM_FIRST = {"mbart", "m2m_100", "whisper", "xglm", "pegasus", "opt", "biogpt"}
"""Model types whose `self_attn_layer_norm` comes before attention, where others have it after."""
POSITION_BIAS = {"bloom", "mpt", "t5", "mt5", "deberta", "deberta-v2"}
"""Model types that add a term for the positions of query and key to the scores."""
QUANTISED = ("qweight", "weight_packed")


@dataclass(frozen=True)
class NotCovered:
    """Attention, or what stands in its place, that no projections are given for.

    Attributes:
        what: path of the modules, with N for the layer's number; or a file.
        layers: their numbers; empty where they have none.
        reason: why not.
    """

    what: str
    layers: list[int]
    reason: str

    def __str__(self) -> str:
        layers = f" (layer {_listed(self.layers)})" if self.layers else ""
        return f"{self.what}{layers}: {self.reason}"


@dataclass
class HeadWeights:
    """The heads of a model, layer by layer; layers are read when iterated over.

    Attributes:
        layers: indices of the layers with attention.
        read: the projections of one of them.
        notes: what the projections leave out, for the reader of any number drawn from them.
        not_covered: what else is in the weight files and has no projections here.
    """

    name: str
    layers: list[int]
    read: Callable[[int], LayerWeights]
    notes: list[str] = field(default_factory=list)
    not_covered: list[NotCovered] = field(default_factory=list)

    def __post_init__(self) -> None:
        read = self.read

        def checked(layer: int) -> LayerWeights:
            if layer not in self.layers:
                raise HeadwiseError(
                    f"{self.name} has no layer {layer}: its layers are {_listed(self.layers)}"
                )
            return read(layer)

        self.read = checked

    def __iter__(self) -> Iterator[tuple[int, LayerWeights]]:
        for layer in self.layers:
            yield layer, self.read(layer)

    def __len__(self) -> int:
        return len(self.layers)


def read_weights(
    model: nn.Module | str | Path, *, fold_norm: bool = False, stack: str | None = None
) -> HeadWeights:
    """The heads of a checkpoint or a model.

    Args:
        model: a transformers or headwise model; or a folder with `config.json` and safetensors, a
            headwise run, or a name on the Hugging Face hub.
        fold_norm: multiply W_Q, W_K, W_V by the gain of the norm before them.
        stack: which stack of layers, where a model has several (`encoder.block`, `decoder.block`).

    Raises:
        HeadwiseError: no weights, weights that would have to be unpickled, or a layout that is not
            known; the line says which.
    """
    source = model if isinstance(model, nn.Module) else find(model)
    if not isinstance(source, nn.Module):
        return _from_names(tensors_of_folder(source), fold_norm, stack)
    if any(isinstance(module, Attention) for module in source.modules()):
        return _from_headwise(source, fold_norm, type(model).__name__ if source is model else str(model))
    return _from_names(tensors_of_module(source), fold_norm, stack)


def _from_names(tensors: Tensors, fold_norm: bool, stack: str | None) -> HeadWeights:
    architecture = Architecture(tensors)
    places = find_places(tensors.names)
    reasons = {place.root: _why_not(place, places, architecture) for place in places}
    good = [place for place in places if reasons[place.root] is None]
    if not good:
        raise HeadwiseError(_nothing_found(tensors, [r for r in reasons.values() if r]))
    stacks = _stacks(good)
    if stack is not None and stack not in stacks:
        why = dict.fromkeys(r for p in places if p.stack == stack and (r := reasons[p.root]))
        if why:
            raise HeadwiseError(f"{stack} of {tensors.name} is not covered: {'; '.join(why)}")
    chosen = _choose(stacks, stack, tensors.name)
    layers = {place.layer: place for place in stacks[chosen] if place.layer is not None}
    for other, others in stacks.items():
        if other != chosen:
            reasons |= dict.fromkeys((p.root for p in others), f"another stack; --stack {other} shows it")
    norms = {layer: _norm_before(place, tensors, architecture) for layer, place in layers.items()}
    foldable = any(norms.values())
    if fold_norm and not foldable:
        raise HeadwiseError(
            f"{tensors.name} has no norm directly before its attention whose gain could be folded in; "
            "leave out --fold-norm"
        )

    def read(layer: int) -> LayerWeights:
        place = layers[layer]
        source = architecture.source_of_kv(place, list(layers.values()))
        weights = cut(place, source, tensors, architecture)
        norm = norms[layer] if fold_norm else None
        return weights if norm is None else _folded(weights, _norm_gain(place, norm, tensors, architecture))

    notes = [*tensors.notes, *architecture.notes, *_notes(tensors, list(layers.values()), architecture)]
    notes += [_fold_note(fold_norm)] if foldable else []
    missing = [layer for layer, norm in norms.items() if norm is None]
    if fold_norm and missing:
        notes.append(f"no norm stands before the attention of layer {_listed(missing)}: nothing folded there")
    left_out = _not_covered(places, reasons, tensors, chosen, set(layers))
    return HeadWeights(tensors.name, list(layers), read, notes, left_out)


def _why_not(place: Place, places: list[Place], architecture: Architecture) -> str | None:
    """Why a place has no projections to show; None where it has."""
    roles, tensors = place.roles, architecture.tensors
    for name in place.tensors.values():
        if name in tensors.unmerged and projection_of(name):
            return tensors.unmerged[name]
    if any(part.startswith("-") and part[1:].isdecimal() for part in place.root.split(".")):
        return "a layer number below 0 does not exist"
    if any(name.endswith(QUANTISED) for name in place.tensors.values()):
        return "its weights are quantised; use the checkpoint they were made from"
    if any("kv_b_proj" in name for name in place.tensors.values()):
        return "multi-head latent attention, whose keys are not one matrix per head"
    if CROSS.search(place.root) or architecture.is_cross(place):
        return "cross-attention, whose queries and keys read two different streams"
    if not roles:
        return "none of its tensors is known as a projection"
    if reason := architecture.unlike(place):
        return reason
    if "o" not in roles:
        return "none of its tensors is known as an output projection"
    if fused := fused_role(roles):
        if fused in ("qkv_proj", "to_kv", "kv_proj", "query_key", "queries_keys_values") and "q" in roles:
            return f"how it uses {fused} beside its query is not known to headwise"
        family = architecture.family(place)
        if layout_of(fused, family, architecture.settings(place)) is None:
            kind = tensors.config.get("model_type") if family is None else family
            return f"how model type {kind!r} lays out its fused {fused} is not known to headwise"
    elif "q" not in roles:
        return "none of its tensors is known as a query projection"
    elif not {"k", "v"} <= roles.keys():
        layers = [p for p in places if p.stack == place.stack and "k" in p.roles]
        shared = architecture.source_of_kv(place, layers) is not None
        if not shared and not ("k" in roles and architecture.values_are_keys(place)):
            absent = " and ".join(role for role in "kv" if role not in roles)
            return f"it has no {absent} of its own, and where they come from is not known to headwise"
    if place.layer is None:
        return "it is not in a numbered stack of layers"
    return None


def _stacks(places: list[Place]) -> dict[str, list[Place]]:
    """Stack to its layers in order; where a layer has several attention modules, each kind is a stack."""
    stacks: dict[str, list[Place]] = {}
    for place in places:
        stacks.setdefault(place.stack, []).append(place)
    for name, group in list(stacks.items()):
        if len({place.layer for place in group}) < len(group):
            del stacks[name]
            for place in group:
                tail = place.root.removeprefix(f"{place.prefix}.")
                stacks.setdefault(f"{name}.N.{tail}", []).append(place)
    return {name: sorted(group, key=lambda p: p.layer or 0) for name, group in stacks.items()}


def _not_covered(
    places: list[Place], reasons: dict[str, str | None], tensors: Tensors, stack: str, covered: set[int]
) -> list[NotCovered]:
    """All attention without projections, alike modules together; and layers without any attention."""
    groups: dict[tuple[str, str], list[int]] = {}

    def add(place: Place, below: str, reason: str) -> None:
        tail = place.root.removeprefix(place.prefix) if place.layer is not None else ""
        what = f"{place.stack}.N{tail}" if place.layer is not None else place.root
        layers = groups.setdefault((f"{what}{below}", reason), [])
        if place.layer is not None and place.layer not in layers:
            layers.append(place.layer)

    for place in places:
        if reason := reasons[place.root]:
            add(place, "", reason)
            continue
        known = set(place.roles.values())
        for path, name in place.tensors.items():
            if name in known or path.endswith("bias") or any(NORM.search(part) for part in path.split(".")):
                continue
            add(place, f".{path}", "it enters attention beside the projections")
    prefix = re.compile(rf"^{re.escape(stack.partition('.N.')[0])}\.(-?\d+)\.")
    numbers = {int(found[1]) for name in tensors.names if (found := prefix.match(name))}
    with_place = {place.layer for place in places if place.stack == stack.partition(".N.")[0]}
    empty = sorted(n for n in numbers - with_place - covered if n >= 0)
    if empty:
        groups[(f"{stack}.N", "none of its tensors is named as attention")] = empty
    if below := sorted(n for n in numbers - with_place if n < 0):
        groups[(f"{stack}.N", "a layer number below 0 does not exist")] = below
    modules = [NotCovered(what, layers, reason) for (what, reason), layers in groups.items()]
    return modules + [NotCovered(file, [], reason) for file, reason in tensors.left_out.items()]


def _folded(weights: LayerWeights, gain: Array) -> LayerWeights:
    return LayerWeights(weights.q * gain, weights.k * gain, weights.v * gain, weights.o)


def _norm_before(place: Place, tensors: Tensors, architecture: Architecture) -> str | None:
    """Name of the gain of the norm before attention; None where there is none."""
    names = list(NORMS)
    settings = architecture.settings(place)
    family = architecture.family(place)
    first = architecture.comes_first(place, "self_attn_layer_norm")
    if first is None:
        listed = NORM_FIRST & {settings.get("model_type"), family}
        first = bool(listed) and settings.get("do_layer_norm_before", True)
    if first:
        names.append("self_attn_layer_norm")
    gains = (f"{place.prefix}.{norm}.weight" for norm in names)
    return next((gain for gain in gains if gain in tensors), None)


def _norm_gain(place: Place, name: str, tensors: Tensors, architecture: Architecture) -> Array:
    """What that norm multiplies by, `(d_model,)`."""
    gain = tensors.get(name).float().cpu().numpy()
    offset = architecture.gain_offset(place, name)
    return gain + np.float32(offset) if offset else gain


def _from_headwise(model: nn.Module, fold_norm: bool, name: str) -> HeadWeights:
    """A headwise model, by what its layers do to unit inputs: every kind of projection alike."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, Attention)]

    @torch.no_grad()
    def read(layer: int) -> LayerWeights:
        place, module = found[layer]
        reference = next(module.parameters())
        size = module.shape
        unit = torch.eye(size.d_model, dtype=reference.dtype, device=reference.device)[:, None]
        q, k, v = (
            (a - b)[:, :, 0].permute(1, 2, 0)
            for a, b in zip(module.heads(unit), module.heads(torch.zeros_like(unit[:1])), strict=True)
        )
        if q.shape[0] != size.n_heads:
            raise HeadwiseError(
                f"{name}: a head of attention kind {module.kind!r} has {q.shape[0] // size.n_heads} queries, "
                "and geometry is of heads with one query and one key"
            )
        width = q.shape[0] * q.shape[1]
        unit = torch.eye(width, dtype=reference.dtype, device=reference.device)
        o = (module.out(unit) - module.out(torch.zeros_like(unit[:1]))).T
        o = o.unflatten(1, (q.shape[0], -1)).transpose(0, 1)
        weights = LayerWeights(*(t.float().cpu().numpy() for t in (q, k, v, o)))
        if not fold_norm:
            return weights
        gain = model.get_parameter(f"{place.rpartition('.')[0]}.attention_norm.weight")
        return _folded(weights, gain.float().cpu().numpy())

    notes = _general_notes(
        biases=any(n.endswith("bias") and "attention." in n for n, _ in model.named_parameters()),
        rope=getattr(model, "rope", None) is not None,
    )
    notes.append(_fold_note(fold_norm))
    return HeadWeights(name, list(range(len(found))), read, notes)


def _notes(tensors: Tensors, places: list[Place], architecture: Architecture) -> list[str]:
    config = architecture.settings(places[0])
    names = [name for place in places for name in place.tensors.values()]
    learned = any("position_embeddings" in n or re.search(r"(^|\.)wpe\.", n) for n in tensors.names)
    rope = any("rope" in key or "rotary" in key for key, value in config.items() if value) and not learned
    biases = any(n.endswith("bias") and "norm" not in n.lower() for n in names)
    notes = _general_notes(biases=biases, rope=rope)
    if any(re.search(r"(q|k|qk)_(norm|layernorm)\.weight$", n) for n in names):
        notes.append("the norm of each query and key is left out: it changes their length, token by token")
    if config.get("model_type") in POSITION_BIAS:
        notes.append("what positions add to the scores is left out")
    shared = {p.layer: architecture.source_of_kv(p, places) for p in places}
    if taken := [layer for layer, source in shared.items() if source is not None and layer is not None]:
        notes.append(
            f"layer {_listed(taken)} takes keys and values of an earlier layer, whose W_K and W_V are shown"
        )
    if any("v" not in (shared[p.layer] or p).roles and not fused_role(p.roles) for p in places):
        notes.append("values are the keys where a layer has no values of its own: W_V is W_K there")
    return notes


def _general_notes(*, biases: bool, rope: bool) -> list[str]:
    notes = []
    if biases:
        notes.append("biases are left out")
    if rope:
        notes.append("RoPE is left out: singular values hold for a query and a key at the same position")
    return notes


def _fold_note(fold_norm: bool) -> str:
    folded = "folded in" if fold_norm else "not folded in (--fold-norm does)"
    return f"the gain of the norm before attention is {folded}"


def _choose(stacks: dict[str, Any], asked: str | None, name: str) -> str:
    if asked is not None:
        return one_of("stack", asked, stacks)
    if len(stacks) > 1:
        raise HeadwiseError(
            f"{name} has several stacks of layers ({', '.join(stacks)}); choose one with --stack"
        )
    return next(iter(stacks))


def _nothing_found(tensors: Tensors, reasons: list[str]) -> str:
    if reasons:
        return f"{tensors.name}: {'; '.join(dict.fromkeys(reasons))}"
    if any(name.endswith(QUANTISED) for name in tensors.names):
        return f"{tensors.name} holds quantised weights; use the checkpoint they were made from"
    return f"{tensors.name}: none of its {len(tensors.names)} tensors is named as an attention projection"


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:4])) + (" …" if len(layers) > 4 else "")
