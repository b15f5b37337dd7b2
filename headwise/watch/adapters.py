"""LoRA adapters merged into the weights they change: W + scale · B A (Hu et al. 2021).

Adapters of PEFT come as a folder of their own (`adapter_config.json`, `adapter_model.safetensors`), beside
the weights of their base, or as `lora_A` and `lora_B` tensors inside a checkpoint or a model in memory.
What cannot be merged exactly is refused, or listed in `Tensors.unmerged`: without its adapter a projection
is not what the model computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.watch.tensors import (
    ADAPTER,
    ADAPTER_CONFIG,
    Tensors,
    find,
    names_in,
    read_object,
    read_tensor,
    tensors_of_folder,
)

PART = re.compile(r"^(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
                  r"(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?$")  # fmt: skip
REFUSED = {
    "use_dora": "DoRA", "layer_replication": "layer replication", "use_qalora": "QALoRA",
    "lora_bias": "a bias", "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained tokens",
}  # fmt: skip


@dataclass(frozen=True)
class _Adapter:
    """A and B of one projection, with the factor of their product."""

    a: Callable[[], Tensor]
    b: Callable[[], Tensor]
    scale: float | None
    transposed: bool = False

    def on(self, weight: Tensor) -> Tensor:
        delta = self.b().double() @ self.a().double()
        delta = delta.T if self.transposed else delta
        return (weight.double() + (self.scale or 0.0) * delta).to(
            torch.promote_types(weight.dtype, torch.float32)
        )


def merged(folder: Path, own: Tensors | None, *, beside: bool = True) -> Tensors:
    """The tensors of a checkpoint with the adapters in `folder` merged.

    Args:
        own: the weights that lie in the folder; None where it holds an adapter alone.
        beside: the folder has an adapter_config.json.

    Raises:
        HeadwiseError: the base is not found, or the adapter is none that can be merged.
    """
    if not beside:
        assert own is not None
        return _merged_inside(own, {})
    settings = read_object(folder / ADAPTER_CONFIG)
    _check(folder, settings)
    if not (folder / ADAPTER).is_file():
        if own is None:
            raise HeadwiseError(f"{folder} holds an adapter without {ADAPTER}; its weights are missing")
        return _merged_inside(own, settings)
    base = own if own is not None else _base(folder, settings)
    held = names_in(folder / ADAPTER)
    return _with_file(base, folder, settings, held)


def merged_in_memory(tensors: Tensors, model: nn.Module) -> Tensors:
    """The same with the active LoRA layers of a PEFT model merged."""

    def scale(module: str, adapter: str) -> float | None:
        layer: Any = model.get_submodule(module)
        active = list(getattr(layer, "active_adapters", [])) == [adapter]
        known = active and not any(getattr(layer, "use_dora", {}).values())
        if getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False):
            return 0.0
        return layer.scaling.get(adapter) if known and hasattr(layer, "scaling") else None

    return _inside(tensors, scale, False)


def _check(folder: Path, settings: dict[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise HeadwiseError(f"{folder} holds an adapter of type {kind!r}, and only LORA can be merged")
    for key, what in REFUSED.items():
        if settings.get(key):
            raise HeadwiseError(
                f"{folder} holds a LoRA adapter with {what} ({key}), which cannot be merged here; "
                "merge it with PEFT and give the merged folder"
            )


def _base(folder: Path, settings: dict[str, Any]) -> Tensors:
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise HeadwiseError(f"{folder} holds an adapter whose adapter_config.json names no base model")
    places = [Path(name).expanduser(), folder / name]
    place = next((p for p in places if p.is_dir()), None)
    try:
        found = place or find(name)
        if not isinstance(found, Path) or found.resolve() == folder.resolve():
            raise HeadwiseError(f"{name} is not a checkpoint of transformers")
        return replace(tensors_of_folder(found), name=str(folder))
    except HeadwiseError as error:
        raise HeadwiseError(
            f"{folder} holds an adapter, and its base {name!r} is not to be had: {error}"
        ) from error


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / √r, of one module, as PEFT takes it from patterns."""

    def of(pattern_key: str, key: str, otherwise: float) -> float:
        patterns = settings.get(pattern_key) or {}
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(settings.get(key) or otherwise)

    r, alpha = of("rank_pattern", "r", rank), of("alpha_pattern", "lora_alpha", rank)
    if int(r) != rank:
        raise HeadwiseError(f"the adapter's {module} has rank {rank}, and adapter_config.json says {r:g}")
    return alpha / math.sqrt(r) if settings.get("use_rslora") else alpha / r


def _with_file(base: Tensors, folder: Path, settings: dict[str, Any], held: list[str]) -> Tensors:
    """The base with every tensor of the adapter's file merged into it or in its place."""
    file, known = folder / ADAPTER, set(base.names)
    pairs: dict[str, dict[str, str]] = {}
    instead: dict[str, str] = {}
    for name in held:
        plain = name.removeprefix("base_model.model.")
        if found := PART.match(plain):
            if found["part"].startswith("lora_embedding"):
                continue
            pairs.setdefault(_target(found["module"] + ".weight", known, folder), {})[found["part"]] = name
        else:
            instead[
                _target(plain.replace(".modules_to_save", "").replace(".base_layer", ""), known, folder)
            ] = name
    adapters = {}
    for target, parts in pairs.items():
        if set(parts) != {"lora_A", "lora_B"}:
            raise HeadwiseError(f"{file} has {', '.join(sorted(parts))} of {target}, not lora_A and lora_B")
        a, b = (lambda n=parts[p]: read_tensor(file, n) for p in ("lora_A", "lora_B"))
        scale = _scale(settings, target.removesuffix(".weight"), a().shape[0])
        adapters[target] = _Adapter(a, b, scale, bool(settings.get("fan_in_fan_out")))

    def get(name: str) -> Tensor:
        weight = read_tensor(file, instead[name]) if name in instead else base.get(name)
        return adapters[name].on(weight) if name in adapters else weight

    note = f"a LoRA adapter is merged into {len(adapters)} projections (W + scale · B A)"
    return replace(base, get=get, notes=[*base.notes, note])


def _target(name: str, known: set[str], folder: Path) -> str:
    """The base's tensor of that name, with or without the prefix of a larger model."""
    if name in known:
        return name
    close = [k for k in known if k.endswith(f".{name}") or name.endswith(f".{k}")]
    if len(close) != 1:
        raise HeadwiseError(f"the adapter in {folder} changes {name}, which its base does not have")
    return close[0]


def _merged_inside(tensors: Tensors, settings: dict[str, Any]) -> Tensors:
    def scale(module: str, adapter: str) -> float | None:
        if not settings:
            return None
        rank = tensors.get(_part(tensors, module, "lora_A", adapter)).shape[0]
        return _scale(settings, module, rank)

    return _inside(tensors, scale, bool(settings.get("fan_in_fan_out")))


def _part(tensors: Tensors, module: str, part: str, adapter: str) -> str:
    names = [f"{module}.{part}.{adapter}.weight", f"{module}.{part}.{adapter}", f"{module}.{part}.weight"]
    return next(name for name in [*names, f"{module}.{part}"] if name in tensors)


def _inside(tensors: Tensors, scale: Callable[[str, str], float | None], transposed: bool) -> Tensors:
    """Tensors under their plain names, with the `lora_A` and `lora_B` among them merged."""
    found = [(name, PART.match(name)) for name in tensors.names]
    if not any(match for _, match in found):
        return tensors
    parts: dict[str, dict[str, dict[str, str]]] = {}
    original: dict[str, str] = {}
    for name, match in found:
        if match:
            parts.setdefault(match["module"], {}).setdefault(match["adapter"] or "", {})[match["part"]] = name
        else:
            original[_plain_name(name)] = name
    adapters, unmerged = {}, {}
    for module, by_adapter in parts.items():
        target = _plain_name(f"{module}.weight")
        (adapter, pair), *more = by_adapter.items()
        factor = None if more or set(pair) != {"lora_A", "lora_B"} else scale(module, adapter)
        if factor is None:
            unmerged[target] = (
                f"{len(by_adapter)} LoRA adapters change it" if more
                else "a LoRA adapter of unknown scale changes it (no adapter_config.json tells)"
            )  # fmt: skip
            continue
        a, b = (lambda n=pair[p]: tensors.get(n) for p in ("lora_A", "lora_B"))
        adapters[target] = _Adapter(a, b, factor, transposed)

    def get(name: str) -> Tensor:
        weight = tensors.get(original[name])
        return adapters[name].on(weight) if name in adapters else weight

    notes = (
        [f"LoRA adapters are merged into {len(adapters)} projections (W + scale · B A)"] if adapters else []
    )
    return replace(tensors, names=list(original), get=get, notes=[*tensors.notes, *notes], unmerged=unmerged)


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
