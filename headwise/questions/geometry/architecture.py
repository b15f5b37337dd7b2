"""What transformers knows of a checkpoint's modules, from its configuration alone.

The model is built on the meta device: classes, attributes and shapes, no weights, no code of the checkpoint.
It tells how many heads a tower has, which layers are softmax attention, and what a norm multiplies by. Where
transformers cannot build the model (a configuration that is incomplete, a package that is missing), the
configuration's own numbers are all there is.
"""

from __future__ import annotations

import copy
import inspect
import re
from functools import cached_property
from typing import Any

import torch
from torch import nn

from headwise.pretrained import CodeRefused, empty_model, load_config
from headwise.questions.geometry.places import Place, find_places, projection_of
from headwise.watch.tensors import Tensors

HEAD_COUNTS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads",
)  # fmt: skip
WIDTHS = ("head_dim", "d_kv", "attention_head_size", "head_size", "key_value_proj_dim", "d_head", "dim_head")
HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
SOFTMAX = re.compile(r"(?i)softmax|ALL_ATTENTION_FUNCTIONS|scaled_dot_product|multi_head_attention_forward")
NOT_SOFTMAX = re.compile(
    r"(?i)linear(self)?_?att|delta|lightning|mamba|rwkv|additive|lsh|deformable|retention"
)
UNLIKE = {
    "DiffLlamaAttention": "the difference of two attention maps weighs its values",
    "Florence2VisionChannelAttention": "it attends over channels, not over tokens",
    "JetMoeAttention": "each token has heads of its own, drawn from a mixture",
    "InklingAttention": "a convolution over tokens follows its projections",
    "Inkling2SlidingAttention": "a convolution over tokens follows its projections",
    "ZayaAttention": "a convolution over tokens follows its projections",
    "CvtSelfAttention": "a convolution precedes its projections",
}
"""Classes whose weights are no q·k circuit of their own, with the reason."""
NORM_PLUS_ONE = {
    "gemma", "gemma2", "gemma3", "gemma3_text", "t5gemma", "t5gemma2", "vaultgemma", "recurrent_gemma",
    "nemotron", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
}  # fmt: skip
"""Model types whose norm multiplies by 1 + weight, where transformers cannot build the model."""


class Architecture:
    """The modules of a checkpoint, as far as transformers knows them."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.notes: list[str] = []

    @cached_property
    def model(self) -> nn.Module | None:
        """The model in memory, or one without weights; None where there is none."""
        if self.tensors.module is not None:
            return self.tensors.module
        if self.tensors.folder is None or "model_type" not in self.tensors.config:
            return None
        try:
            config = load_config(self.tensors.folder)
        except CodeRefused:
            self.notes.append("the checkpoint's own code is not run: its layers are read by their names")
            return None
        except Exception:  # of many libraries, for a configuration that transformers does not know
            return None
        return _whole(config) or _try(lambda: empty_model(config))

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        state = {} if self.model is None else self.model.state_dict()
        return {name: tuple(value.shape) for name, value in state.items() if hasattr(value, "shape")}

    @cached_property
    def _roots(self) -> dict[str, Place]:
        return {place.root: place for place in find_places(self._shapes)}

    @cached_property
    def _matches(self) -> dict[str, str | None]:
        return {}

    def root_of(self, place: Place) -> str | None:
        """The path in the model of a place in the checkpoint, whose names may have other prefixes."""
        if place.root not in self._matches:
            self._matches[place.root] = self._match(place)
        return self._matches[place.root]

    def _match(self, place: Place) -> str | None:
        if place.root in self._roots:
            return place.root
        mine = place.root.split(".")
        numbers = [part for part in mine if part.isdecimal()]
        best: list[tuple[tuple[int, int], str]] = []
        for root in self._roots:
            theirs = root.split(".")
            if [part for part in theirs if part.isdecimal()] != numbers or theirs[-1] != mine[-1]:
                continue
            tail = next(
                (i for i, (a, b) in enumerate(zip(mine[::-1], theirs[::-1], strict=False)) if a != b),
                min(len(mine), len(theirs)),
            )
            best.append(((tail, len(set(mine) & set(theirs))), root))
        if not best:
            return None
        top = max(score for score, _ in best)
        first, *others = (root for score, root in best if score == top)
        same = all(self._describe(first) == self._describe(other) for other in others)
        return first if same else None

    def _describe(self, root: str) -> tuple[type, dict[str, Any]]:
        module = self._module(root)
        return type(module), {n: tuple(p.shape) for n, p in module.named_parameters()} if module else {}

    def _module(self, path: str) -> nn.Module | None:
        return None if self.model is None else _try(lambda: self.model.get_submodule(path))

    def modules_of(self, place: Place) -> list[nn.Module]:
        """The module that holds a place's query projection, and those around it, innermost first."""
        root = self.root_of(place)
        if root is None:
            return []
        path = root
        for below in self._roots[root].tensors:
            if projection_of(below) and "output" not in below.split("."):
                inside = below if below.rpartition(".")[2] != "weight" else below.rpartition(".")[0]
                path = f"{root}.{inside}".rpartition(".")[0]
                break
        parts = path.split(".")
        around = [self._module(".".join(parts[:n])) for n in range(len(parts), 0, -1)]
        return [m for m in [*around, self.model] if m is not None]

    def _known_as(self, place: Place, name: str) -> str | None:
        """The model's name of a tensor of the place: of the same path, else of the same role."""
        root = self.root_of(place)
        if root is None:
            return None
        theirs = self._roots[root]
        if same := theirs.tensors.get(name.removeprefix(f"{place.root}.")):
            return same
        return next((theirs.roles.get(role) for role, mine in place.roles.items() if mine == name), None)

    def module_at(self, place: Place, name: str) -> nn.Module | None:
        """The module that owns a tensor of the checkpoint, one of the place's or of its layer's."""
        if name.startswith(f"{place.root}."):
            known = self._known_as(place, name)
            return None if known is None else self._module(known.rpartition(".")[0])
        prefix = self._layer_of(place)
        if prefix is None:
            return None
        return self._module(f"{prefix}{name.removeprefix(place.prefix)}".rpartition(".")[0])

    def _layer_of(self, place: Place) -> str | None:
        """The path in the model of the layer that the place is in."""
        root, tail = self.root_of(place), place.root.removeprefix(place.prefix)
        return None if root is None else root.removesuffix(tail) if tail else root

    def comes_first(self, place: Place, norm: str) -> bool | None:
        """Whether a layer applies this norm before its attention; None where its code does not tell."""
        prefix = self._layer_of(place)
        layer = self._module(prefix) if prefix is not None else None
        if layer is None or not hasattr(layer, norm):
            return None
        source = _source(type(layer).forward)
        attention = place.root.removeprefix(f"{place.prefix}.").partition(".")[0]
        at, attends = source.find(f"self.{norm}("), source.find(f"self.{attention}(")
        if at < 0 or attends < 0:
            return None
        return at < attends and bool(getattr(layer, "do_layer_norm_before", True))

    def attribute(self, place: Place, names: tuple[str, ...]) -> Any:
        """The first of these attributes that the attention module itself has."""
        for module in self._attention(place):
            for name in names:
                value = getattr(module, name, None)
                if isinstance(value, int) and value > 0:
                    return value
        return None

    def _attention(self, place: Place) -> list[nn.Module]:
        root = self.root_of(place)
        return self.modules_of(place)[: 1 + _depth_below(root, self, place)] if root else []

    def settings(self, place: Place) -> dict[str, Any]:
        """The configuration of the tower that a place belongs to."""
        for module in self.modules_of(place):
            config = getattr(module, "config", None)
            if hasattr(config, "to_dict"):
                return config.to_dict()  # type: ignore[union-attr]
        return _part_of(self.tensors.config, place.root)

    def raw_settings(self, place: Place) -> dict[str, Any]:
        """The same, but only what config.json states: without transformers' defaults."""
        if self.tensors.folder is None:
            return self.settings(place)
        kind = self.settings(place).get("model_type")
        return next(
            (part for part in _parts(self.tensors.config) if part.get("model_type") == kind),
            _part_of(self.tensors.config, place.root),
        )

    def heads(self, place: Place) -> int | None:
        """Query heads of a place: of its module, else of its tower's configuration."""
        side = next((s for s in ("encoder", "decoder") if s in place.root), "")
        counts = (f"{side}_attention_heads", *HEAD_COUNTS)
        if found := self.attribute(place, HEAD_COUNTS):
            return int(found)
        for module in self.modules_of(place):
            config = getattr(module, "config", None)
            values = (getattr(config, name, None) for name in counts)
            if value := next((value for value in values if isinstance(value, int)), 0):
                return int(value)
        return self.stated_heads(place)

    def stated_heads(self, place: Place) -> int | None:
        """Query heads as config.json itself has them, without transformers' defaults."""
        side = next((s for s in ("encoder", "decoder") if s in place.root), "")
        for values in (_part_of(self.tensors.config, place.root), self.tensors.config):
            for name in (f"{side}_attention_heads", *HEAD_COUNTS):
                if isinstance(values.get(name), int):
                    return int(values[name])
        return None

    def width(self, place: Place) -> int | None:
        """Width of a query head, where module or configuration tell."""
        if found := self.attribute(place, WIDTHS):
            return int(found)
        settings = self.raw_settings(place)
        if value := next((settings[n] for n in WIDTHS if isinstance(settings.get(n), int)), 0):
            return int(value)
        hidden = next((settings[n] for n in HIDDEN if isinstance(settings.get(n), int)), 0)
        heads = next((settings[n] for n in HEAD_COUNTS if isinstance(settings.get(n), int)), 0)
        return hidden // heads if hidden and heads and hidden % heads == 0 else None

    def states_input(self, place: Place, size: int) -> bool:
        """Whether config.json states that the place reads a stream of this width."""
        settings = self.raw_settings(place)
        return any(settings.get(name) == size for name in HIDDEN)

    def shape_of(self, place: Place, name: str) -> tuple[int, ...] | None:
        """The shape that the model gives to a tensor of the place."""
        known = self._known_as(place, name)
        return self._shapes.get(known) if known else None

    def family(self, place: Place) -> str | None:
        """The folder of transformers whose class the place has, such as `gpt_neox`; else its model type."""
        for module in self.modules_of(place):
            parts = type(module).__module__.split(".")
            if parts[:2] == ["transformers", "models"]:
                return parts[2]
        config = self.tensors.config
        kind = _part_of(config, place.root).get("model_type", config.get("model_type"))
        return str(kind).replace("-", "_") if kind else None

    def unlike(self, place: Place) -> str | None:
        """Why a place is not softmax attention with a q·k circuit; None where it is, or nothing is known."""
        for module in self._attention(place):
            for name in (part.__name__ for part in type(module).__mro__):  # DiffLlamaSdpaAttention is one too
                if name in UNLIKE:
                    return UNLIKE[name]
        kinds = self.settings(place).get("layer_types") or self.settings(place).get("layers_block_type")
        if isinstance(kinds, list) and place.layer is not None and place.layer < len(kinds):
            kind = str(kinds[place.layer])
            if re.search(r"linear|mamba|conv|recurrent|ssm", kind):
                return f"its layer is of type {kind}, which has no softmax attention"
        if re.search(r"(?i)linear_att|delta|mamba", place.root):
            return "linear attention has no softmax over keys"
        modules = [m for m in self._attention(place) if type(m).__module__.startswith("transformers.")]
        if modules and (any(NOT_SOFTMAX.search(type(m).__name__) for m in modules) or not _softmax(modules)):
            return f"{type(modules[0]).__name__} is not plain softmax attention"
        return None

    def is_cross(self, place: Place) -> bool:
        """Whether the module is built to read another sequence."""
        modules = self._attention(place)
        return any(getattr(module, "is_cross_attention", False) is True for module in modules)

    def source_of_kv(self, place: Place, others: list[Place]) -> Place | None:
        """The place whose keys and values this one takes; None where it has its own."""
        modules = self._attention(place)
        if not any(getattr(module, "is_kv_shared_layer", False) is True for module in modules):
            return None
        kind = getattr(modules[0], "layer_type", None)
        for other in reversed(others):
            theirs = self._attention(other)
            if (
                other.layer is not None and place.layer is not None and other.layer < place.layer and theirs
                and getattr(theirs[0], "layer_type", None) == kind
                and getattr(theirs[0], "store_full_length_kv", False)
            ):  # fmt: skip
                return other
        return None

    def values_are_keys(self, place: Place) -> bool:
        """Whether the module takes its keys as values too."""
        modules = self._attention(place)
        if modules:
            return any(getattr(module, "v_proj", module) is None for module in modules)
        return bool(self.raw_settings(place).get("attention_k_eq_v"))

    def gain_offset(self, place: Place, name: str) -> float:
        """What a norm adds to its stored weight: 0, or 1 where it multiplies by 1 + weight."""
        norm = self.module_at(place, name)
        found = None if norm is None else _try(lambda: _offset(norm))
        if found is not None:
            return found
        return float(self.settings(place).get("model_type") in NORM_PLUS_ONE)


def _whole(config: Any) -> nn.Module | None:
    """The class that the checkpoint names, whose tensors have the checkpoint's names."""
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and hasattr(kind, "_from_config")):
        return None

    def build() -> Any:
        with torch.device("meta"):
            return kind._from_config(config)

    return _try(build)


def _try(make: Any) -> Any:
    """What `make` returns; None where libraries fail at it."""
    try:
        return make()
    except Exception:  # transformers raises errors of many libraries
        return None


def _offset(norm: nn.Module) -> float | None:
    """Run a norm with its weight at 0 and 1: what it adds to the weight."""
    real = copy.deepcopy(norm).to_empty(device="cpu").float()
    parameters = dict(real.named_parameters())
    if "weight" not in parameters:
        return None
    size = parameters["weight"].shape[-1]
    x = torch.linspace(-1, 2, size)[None]
    outputs = []
    with torch.no_grad():
        for value in (0.0, 1.0):
            for name, parameter in parameters.items():
                parameter.fill_(value if name == "weight" else 0.0)
            outputs.append(real(x).abs().sum().item())
    step = outputs[1] - outputs[0]
    return outputs[0] / step if step > 0 else None


def _softmax(modules: list[nn.Module]) -> bool:
    """Whether a class among those of an attention module computes a softmax over keys."""
    for module in modules:
        for part in [type(module), *(type(child) for child in module.children())]:
            for kind in part.__mro__:
                if kind.__module__.startswith("transformers.") and SOFTMAX.search(_source(kind)):
                    return True
                if kind is nn.MultiheadAttention:
                    return True
    return False


def _source(kind: Any) -> str:
    return _try(lambda: inspect.getsource(kind)) or "softmax"


def _depth_below(root: str, architecture: Architecture, place: Place) -> int:
    """How many modules lie between a place's root and its projections."""
    modules, top = architecture.modules_of(place), architecture._module(root)
    return next((i for i, module in enumerate(modules) if module is top), 0)


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A configuration and all inside it, outermost first."""
    named = [v for k, v in config.items() if k.endswith("config") or k in ("encoder", "decoder")]
    inner = [value for value in named if isinstance(value, dict)]
    return [config, *(part for one in inner for part in _parts(one))]


def _part_of(config: dict[str, Any], root: str) -> dict[str, Any]:
    """The configuration inside a larger one that describes the tower at `root`, by its name."""
    words = root.lower()
    for key, value in config.items():
        if not isinstance(value, dict):
            continue
        stem = key.removesuffix("_config")
        alias = "vis" if stem == "vision" else re.escape(stem)
        if key.endswith("_config") and stem != "text" and re.search(alias, words):
            return _part_of(value, root)
    text = config.get("text_config")
    return _part_of(text, root) if isinstance(text, dict) else config
