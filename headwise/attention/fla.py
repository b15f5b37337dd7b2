"""`fla`: any layer of the package flash-linear-attention by name (Yang and Zhang 2024, `fla.layers`).

A layer brings its own projections, gates, convolutions and positions: it is built with d_model, the heads and
the layer's number as far as its constructor takes them, and maps `(B, T, d_model)` to the same shape. Its
kernels need a CUDA device; it is always causal.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor, nn

from headwise.attention.base import Attention, AttentionShape, Carry, Rope
from headwise.attention.kinds import register
from headwise.attention.modifiers import MODIFIERS
from headwise.attention.observation import Unmeasured
from headwise.errors import HeadwiseError, one_of

PACKAGE = "fla.layers"

MASK = "attention_mask"
"""An argument that some layers must be given; None is no padding."""
INSTALL = "attention kind 'fla' needs the package flash-linear-attention: pip install 'headwise[fla]'"
QUADRATIC = frozenset(
    {
        "attn", "bitattn", "deltaformer", "forgetting_attn", "mla", "parallax", "path_attn",
        "stickbreaking_attn", "wall_attn",
    }
)  # fmt: skip
"""Layers whose queries are multiplied with all keys."""


@dataclass
class FlaConfig:
    """A layer of flash-linear-attention.

    Attributes:
        layer: its name: that of its module in `fla.layers`, such as gated_deltanet, gla or forgetting_attn,
            or of its class where a module has several, such as RodimusAttention.
        arguments: more arguments of its constructor, as a mapping in YAML: "{expand_v: 1, use_gate: false}".
            They win over those taken from the model.
    """

    layer: str = "gated_deltanet"
    arguments: str = "{}"

    def validate_values(self) -> None:
        """Refuse what has no meaning, also where another kind is chosen.

        Raises:
            HeadwiseError: a name that no layer can have, or arguments that are not a mapping of plain values.
        """
        if not self.layer.isidentifier():
            raise HeadwiseError(
                f"model.attention.fla.layer is {self.layer!r}; give a name such as gated_deltanet"
            )
        self.mapping()

    def mapping(self) -> dict[str, Any]:
        """The arguments by name.

        Raises:
            HeadwiseError: they are not a mapping of plain values.
        """
        try:
            found = yaml.safe_load(self.arguments)
        except yaml.YAMLError:
            found = None
        plain = (bool, int, float, str, type(None))
        if isinstance(found, dict) and all(
            isinstance(key, str) and isinstance(value, plain) for key, value in found.items()
        ):
            return found
        raise HeadwiseError(
            f"model.attention.fla.arguments is {self.arguments!r}; give a mapping of plain values such as "
            "'{expand_v: 1}'"
        )


def layers(package: ModuleType) -> dict[str, type[nn.Module]]:
    """The layers of `fla.layers` by the name of their module, or of their class where it has several."""
    classes = {name: getattr(package, name) for name in package.__all__}
    by_module: dict[str, list[type[nn.Module]]] = {}
    for cls in classes.values():
        by_module.setdefault(cls.__module__.rpartition(".")[2], []).append(cls)
    alone = {name: found[0] for name, found in by_module.items() if len(found) == 1}
    return alone | {name: cls for name, cls in classes.items() if cls not in alone.values()}


def build(shape: AttentionShape, options: FlaConfig) -> tuple[str, nn.Module]:
    """The layer that the options name, and the name of its module.

    Raises:
        HeadwiseError: the package is missing, it has no such layer, or the layer refuses its arguments.
    """
    if importlib.util.find_spec(PACKAGE.partition(".")[0]) is None:
        raise HeadwiseError(INSTALL)
    try:
        known = layers(importlib.import_module(PACKAGE))
    except ImportError as error:
        raise HeadwiseError(f"flash-linear-attention is installed but cannot be imported: {error}") from error
    cls = known[one_of("model.attention.fla.layer", options.layer, known)]
    needs = [
        name
        for name, one in list(inspect.signature(cls.forward).parameters.items())[2:]
        if one.default is inspect.Parameter.empty
        and one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        and name != MASK
    ]
    if needs:
        raise HeadwiseError(
            f"layer {options.layer} also needs {needs[0]}: it cannot be used alone in a decoder"
        )
    takes = inspect.signature(cls).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values())
    given = {
        "hidden_size": shape.d_model, "num_heads": shape.n_heads, "num_kv_heads": shape.n_kv_heads,
        "num_key_value_heads": shape.n_kv_heads, "head_dim": shape.head_dim, "qkv_bias": shape.bias,
        "num_hidden_layers": shape.n_layers, "layer_idx": _number(cls, shape),
    }  # fmt: skip
    own = options.mapping()
    if unknown := [name for name in own if name not in takes and not takes_all]:
        one_of(f"an argument of {options.layer}", unknown[0], takes)
    arguments = {name: value for name, value in given.items() if name in takes} | own
    try:
        return cls.__module__.rpartition(".")[2], cls(**arguments)
    except (AssertionError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise HeadwiseError(
            f"layer {options.layer} of flash-linear-attention cannot be built with {arguments}: {said}; "
            "set model.attention.fla.arguments"
        ) from error


def _number(cls: type[nn.Module], shape: AttentionShape) -> int:
    """The layer's index; 0 where later layers want the first one's values, which are not handed on."""
    return 0 if "v_first" in inspect.signature(cls.forward).parameters else shape.layer


@register("fla")
class FlaAttention(Attention):
    """A layer of flash-linear-attention."""

    options = FlaConfig
    supports = frozenset({"causal", "gqa"})
    declines = dict.fromkeys(MODIFIERS, "its layers are another package's, with projections of their own")
    engine_family = "fla"
    projects = False
    needs_cuda: ClassVar[bool] = True

    def __init__(self, shape: AttentionShape, options: FlaConfig | None = None) -> None:
        super().__init__(shape, options)
        self.config = options or FlaConfig()
        self.layer_name, self.inner = build(shape, self.config)
        asked = inspect.signature(type(self.inner).forward).parameters
        self.no_mask: dict[str, None] = {MASK: None} if MASK in asked else {}
        drawn = {
            f"{place}.weight" if place else "weight"
            for place, module in self.inner.named_modules()
            if isinstance(module, nn.Linear | nn.Conv1d)
        }
        self._starts = {
            name: parameter.detach().clone()
            for name, parameter in self.inner.named_parameters()
            if name not in drawn
        }

    @torch.no_grad()
    def initialise(self) -> None:
        """Matrices and convolutions are drawn as the model's, as the package's own models draw them.

        Everything else starts as the layer starts it, and its output projection as what ends a branch.
        """
        for name, value in self._starts.items():
            self.inner.get_parameter(name).copy_(value)
        end = getattr(self.inner, "o_proj", None)
        if isinstance(end, nn.Linear):
            end.weight.div_(math.sqrt(2 * self.shape.n_layers))

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        causal: bool = True,
        rope: Rope | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        """The layer's output, `(B, T, d_model)`.

        Raises:
            HeadwiseError: a rotation, a device without kernels, or an input that the layer refuses.
            ValueError: a mask, or non-causal attention.
        """
        self._check(x, attn_mask, causal)
        if rope is not None:
            raise HeadwiseError(
                "layers of kind 'fla' encode positions themselves, and a rotation cannot be applied to them: "
                "set model.position to none (or sinusoidal or learned)"
            )
        if self.needs_cuda and not x.is_cuda:
            raise HeadwiseError(_no_cuda())
        self.record_engine(f"fla-{self.layer_name}")
        try:
            y = self.inner(hidden_states=x, **self.no_mask)
        except AssertionError as error:  # such as a dtype without a kernel
            raise HeadwiseError(
                f"layer {self.config.layer} of flash-linear-attention refuses its input ({x.dtype}, "
                f"{tuple(x.shape)}): {' '.join(str(error).split())}"
            ) from error
        y = y[0] if isinstance(y, tuple) else y
        if not isinstance(y, Tensor) or y.shape != x.shape:
            gives = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise HeadwiseError(
                f"layer {self.config.layer} of flash-linear-attention returns {gives} for {tuple(x.shape)}: "
                "it cannot be used alone in a decoder"
            )
        if self.observer is not None:
            self.observer(
                Unmeasured(f"layer {self.config.layer} of flash-linear-attention returns no weights")
            )
        return y

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Refused.

        Raises:
            HeadwiseError: always.
        """
        raise HeadwiseError(
            "layers of kind 'fla' do not expose their projections, so they have no q, k and v"
        )

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """The package is missing, or the device is not a GPU."""
        if importlib.util.find_spec(PACKAGE.partition(".")[0]) is None:
            return INSTALL
        return _no_cuda() if cls.needs_cuda and device != "cuda" else None

    def undecodable(self) -> str | None:
        """The package's caches are not taken over."""
        return "layers of kind 'fla' keep a cache of their own form, which headwise does not read"

    @classmethod
    def flops_per_token(cls, shape: AttentionShape, options: Any, seq_len: int) -> int:
        """An estimate, since the package reports none: a D x D state per head, written and read per token.

        For layers that compare with all keys: scores and values. The sizes of the layer's matrices are
        counted separately.
        """
        if (options or FlaConfig()).layer in QUADRATIC:
            return super().flops_per_token(shape, options, seq_len)
        return 4 * shape.n_heads * shape.head_dim**2


def _no_cuda() -> str:
    return (
        "attention kind 'fla' runs only on a CUDA device: the kernels of flash-linear-attention are written "
        "for GPUs; use --device cuda, or another kind"
    )
