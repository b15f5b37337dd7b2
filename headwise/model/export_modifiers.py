"""Architectures of transformers that compute what a Llama-shaped decoder with modifiers does.

    Mistral     the same window in every layer
    Ministral   one window, and layers that see every key
    Qwen3       qk_norm, with windows as Ministral has them or without
    GPT-OSS     a sink, zero or learned, with windows likewise or without
    Qwen3-Next  qk_norm and an output gate; one number a head is written once for every element

GPT-OSS has mixtures of experts and a clamped SwiGLU with a bias: here one expert that every token takes, a
clamp that nothing reaches, and the bias taken out again. Nothing has a value residual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.attention.modifiers import MODIFIERS
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder

BEYOND = 1e30
"""GPT-OSS's clamp: no activation reaches it."""

RAISED = 2.0**12
"""Factor on the half of GPT-OSS's MLP that 1 is added to, so that the sum rounds as finely as in a SwiGLU."""


@dataclass(frozen=True)
class Architecture:
    """What one architecture has.

    Attributes:
        needs: modifiers that it always has.
        takes: all that it can have.
        mixed: whether layers may differ in having the window.
        biases: whether all of its projections can have biases.
    """

    name: str
    config: str
    model: str
    needs: frozenset[str]
    takes: frozenset[str]
    mixed: bool = True
    biases: bool = False


def _architecture(name: str, needs: str, takes: str = "", **more: Any) -> Architecture:
    stem = name.replace("-OSS", "Oss").replace("GPT", "Gpt").replace("-", "")
    own = frozenset(needs.split())
    return Architecture(
        name, f"{stem}Config", f"{stem}ForCausalLM", own, own | frozenset(takes.split()), **more
    )


ARCHITECTURES = (
    _architecture("Mistral", "windows", mixed=False),
    _architecture("Ministral", "windows"),
    _architecture("Qwen3", "qk_norm", "windows"),
    _architecture("GPT-OSS", "sink", "windows", biases=True),
    _architecture("Qwen3-Next", "qk_norm output_gate"),
)


def modifiers_of(config: ModelConfig) -> list[str]:
    """The modifiers that are on in any layer, in the order of `MODIFIERS`."""
    on = {name for layer in range(config.n_layers) for name in config.attention.modifiers(layer).present()}
    return [name for name in MODIFIERS if name in on]


def architecture_of(config: ModelConfig, name: str) -> Architecture:
    """The first architecture that has the modifiers of a Llama-shaped model.

    Args:
        name: what to call the model in an error.

    Raises:
        HeadwiseError: there is none; names the settings in the way.
    """
    on, windows = modifiers_of(config), _windows(config)
    numbers = {window for window in windows if window is not None}
    if len(numbers) > 1 or 1 in numbers:
        what = "windows of several lengths" if len(numbers) > 1 else "a window of one key"
        raise HeadwiseError(
            f"{name} cannot be exported: model.attention.windows is {config.attention.windows}, and no "
            f"architecture of transformers has {what}; train with one length, such as [256, full]"
        )
    for known in ARCHITECTURES:
        if known.needs <= set(on) <= known.takes and (known.mixed or None not in windows):
            break
    else:
        has = " and ".join(f"model.attention.{key}={getattr(config.attention, key)}" for key in on)
        ways = ", ".join(f"{known.name} {_has(known)}" for known in ARCHITECTURES)
        together = " together" if len(on) > 1 else ""
        raise HeadwiseError(
            f"{name} cannot be exported: no architecture of transformers that is known here has {has}"
            f"{together}; {ways}"
        )
    if config.bias and not known.biases:
        raise HeadwiseError(
            f"{name} cannot be exported: model.bias is true, and {known.name}, which has its modifiers, has "
            "no biases in its MLP; train with --model.bias=false"
        )
    return known


def _has(known: Architecture) -> str:
    more = known.takes - known.needs
    needed = " and ".join(name for name in MODIFIERS if name in known.needs)
    return f"has {needed}" + (f" (and {' and '.join(sorted(more))})" if more else "")


def make_config(known: Architecture, model: Decoder, common: dict[str, Any]) -> Any:
    """The configuration of transformers; `common` is what all Llama-shaped models share.

    Raises:
        HeadwiseError: the installed transformers does not have the architecture.
    """
    import transformers

    if not hasattr(transformers, known.config):
        raise HeadwiseError(
            f"the installed transformers {transformers.__version__} does not have {known.name}; upgrade it"
        )
    ours, windows = model.config, _windows(model.config)
    window = next((window for window in windows if window is not None), None)
    own: dict[str, Any] = {"architectures": [known.model]}
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if known.name == "Mistral":
        own |= {"sliding_window": window}
    elif known.name != "Qwen3-Next":
        own |= {"layer_types": types, "sliding_window": window or model.max_seq_len}
    if known.name == "Qwen3":
        own |= {"use_sliding_window": window is not None, "attention_bias": False}
    elif known.name == "GPT-OSS":
        own |= {
            "num_local_experts": 1, "num_experts_per_tok": 1, "swiglu_alpha": 1.0, "swiglu_limit": BEYOND,
            "attention_bias": ours.bias,
        }  # fmt: skip
    elif known.name == "Qwen3-Next":
        rotated = common["rope_parameters"] | {"partial_rotary_factor": 1.0}
        own |= {
            "layer_types": types, "num_experts": 0, "partial_rotary_factor": 1.0, "rope_parameters": rotated,
        }  # fmt: skip
    return getattr(transformers, known.config)(**common | own)


def renamed(known: Architecture, model: Decoder, named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Weights under Llama's names, and the modifiers', as the architecture has them."""
    weights = dict(named)
    for layer, attention in enumerate(model.attentions()):
        at, modifiers = f"model.layers.{layer}.self_attn", attention.modifiers
        if modifiers is not None and modifiers.qk_norm is not None:
            weights[f"{at}.q_norm.weight"] = modifiers.qk_norm.q
            weights[f"{at}.k_norm.weight"] = modifiers.qk_norm.k
        if (sink := attention.sink()) is not None:
            weights[f"{at}.sinks"] = sink
        if modifiers is not None and modifiers.gate is not None:
            width = attention.shape.head_dim
            gate = modifiers.gate.project.weight.unflatten(0, (-1, modifiers.gate.width))
            query = weights[f"{at}.q_proj.weight"].unflatten(0, (-1, width))
            both = torch.cat((query, gate.expand(-1, width, -1)), dim=1)
            weights[f"{at}.q_proj.weight"] = both.flatten(0, 1)
        if known.name == "GPT-OSS":
            _one_expert(weights, f"model.layers.{layer}.mlp")
    if known.name == "Qwen3-Next":  # its norms multiply by 1 + weight
        for name in weights:
            if "norm" in name:
                weights[name] = weights[name] - 1
    return weights


def _one_expert(weights: dict[str, Tensor], at: str) -> None:
    """An MLP `down(silu(gate) * up)` as the one expert of `down((up + 1) * gate * sigmoid(gate))`."""
    gate, up, down = (weights.pop(f"{at}.{name}_proj.weight") for name in ("gate", "up", "down"))
    biases = [weights.pop(f"{at}.{name}_proj.bias", None) for name in ("gate", "up", "down")]
    of_gate, of_up, of_down = (
        matrix.new_zeros(len(matrix)) if bias is None else bias
        for bias, matrix in zip(biases, (gate, up, down), strict=True)
    )
    pairs = torch.stack((gate, RAISED * up), dim=1).flatten(0, 1)
    weights[f"{at}.experts.gate_up_proj"] = pairs.T[None]
    weights[f"{at}.experts.gate_up_proj_bias"] = torch.stack((of_gate, RAISED * of_up - 1), 1).flatten()[None]
    weights[f"{at}.experts.down_proj"] = down.T[None] / RAISED
    weights[f"{at}.experts.down_proj_bias"] = of_down[None]
    weights[f"{at}.router.weight"] = gate.new_zeros(1, gate.shape[1])
    weights[f"{at}.router.bias"] = gate.new_zeros(1)


def _windows(config: ModelConfig) -> list[int | None]:
    return [config.attention.modifiers(layer).window for layer in range(config.n_layers)]
