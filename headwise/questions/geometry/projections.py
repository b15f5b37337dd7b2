"""Every head's W_Q, W_K, W_V, W_O from any checkpoint, read from its weights without running it.

Projections are found by their names inside a layer, and cut into heads by their shapes and the
number of heads; `FUSED` says how each fused projection is laid out. A new architecture that names
its projections as others do needs no code here.

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
from torch import Tensor, nn

from headwise.attention.base import Attention
from headwise.errors import HeadwiseError, one_of
from headwise.watch.tensors import Tensors, find, tensors_of_folder, tensors_of_module

Array = NDArray[np.float32]

LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layers|layer|h|blocks|block))\.(?P<index>\d+)\.(?P<rest>.+)$")
ATTENTION = re.compile(r"(?i)(^|\.|_)(self_?)?(attn|attention)\b")
CROSS = re.compile(r"(?i)cross|encoder_att|encdec|encoder_decoder")

SEPARATE = {
    "q": ("q_proj", "query", "query_proj", "q_lin", "wq", "q"),
    "k": ("k_proj", "key", "key_proj", "k_lin", "wk", "k"),
    "v": ("v_proj", "value", "value_proj", "v_lin", "wv", "v"),
}
OUTPUT = ("o_proj", "out_proj", "out_lin", "dense", "c_proj", "Wo", "wo", "o")
FUSED = {
    "qkv_proj": "stacked", "Wqkv": "stacked", "in_proj_weight": "stacked", "qkv": "stacked",
    "c_attn": "stacked", "query_key_value": "by_head",
}  # fmt: skip
"""`stacked`: all queries, all keys, all values. `by_head`: q, k, v of each head in turn.
`by_group`: the queries of a group, then its key, then its value."""

BY_HEAD = {"gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "persimmon"}
"""Model types whose `query_key_value` is known to be laid out by head (or by group)."""

HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
NORMS = (
    "input_layernorm", "attention_norm", "ln_1", "ln_attn", "norm_1", "norm1", "attn_norm",
    "layernorm_before", "layer_norm1", "attention_layernorm", "attention.LayerNorm", "layer.0.layer_norm",
)  # fmt: skip
"""Norms whose output enters the projections."""
NORM_FIRST = {"mbart", "m2m_100", "whisper", "xglm", "pegasus", "opt", "biogpt"}
"""Model types whose `self_attn_layer_norm` comes before attention, where others have it after."""
NORM_PLUS_ONE = {
    "gemma", "gemma2", "gemma3", "gemma3_text", "t5gemma", "t5gemma2", "vaultgemma", "recurrent_gemma",
    "nemotron", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
}  # fmt: skip
"""Model types whose norm multiplies by 1 + weight."""
POSITION_BIAS = {"bloom", "mpt", "t5", "mt5", "deberta", "deberta-v2"}
"""Model types that add a term for the positions of query and key to the scores."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer in float32: q `(H, D, d_model)`, k and v `(K, D, d_model)`, o `(H, d_model, D)`."""

    q: Array
    k: Array
    v: Array
    o: Array


@dataclass
class HeadWeights:
    """The heads of a model, layer by layer; layers are read when iterated over.

    Attributes:
        layers: indices of the layers with attention.
        notes: what the projections leave out, for the reader of any number drawn from them.
    """

    name: str
    layers: list[int]
    read: Callable[[int], LayerWeights]
    notes: list[str] = field(default_factory=list)

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
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in tensors.names:
        if found := LAYER.match(name):
            layers = stacks.setdefault(found["stack"], {})
            layers.setdefault(int(found["index"]), {})[found["rest"]] = name
    stacks = {
        name: kept
        for name, layers in stacks.items()
        if (kept := {i: rest for i, rest in sorted(layers.items()) if _roles(rest)})
    }
    if not stacks:
        raise HeadwiseError(_nothing_found(tensors))
    chosen = _choose(stacks, stack, tensors.name)
    layers = stacks[chosen]
    heads = _head_count(tensors.config, chosen, tensors.name)
    norms = {layer: _norm_before(rest, tensors) for layer, rest in layers.items()}
    foldable = any(norms.values())
    if fold_norm and not foldable:
        raise HeadwiseError(
            f"{tensors.name} has no norm directly before its attention whose gain could be folded in; "
            "leave out --fold-norm"
        )

    def read(layer: int) -> LayerWeights:
        weights = _cut(layers[layer], heads, tensors, f"{chosen}.{layer}")
        norm = norms[layer] if fold_norm else None
        return weights if norm is None else _folded(weights, _norm_gain(norm, tensors))

    notes = _notes(tensors, [name for rest in layers.values() for name in rest])
    notes += [_fold_note(fold_norm)] if foldable else []
    missing = [layer for layer, norm in norms.items() if norm is None]
    if fold_norm and missing:
        notes.append(f"no norm stands before the attention of layer {_listed(missing)}: nothing folded there")
    return HeadWeights(tensors.name, list(layers), read, notes)


def _roles(rest: dict[str, str]) -> dict[str, str]:
    """Role (q, k, v, o, or the name of a fused projection) to tensor, of one layer."""
    roles: dict[str, str] = {}
    for path, name in rest.items():
        module, _, leaf = path.rpartition(".")
        projection = leaf if leaf in FUSED else module.rpartition(".")[2] if leaf == "weight" else ""
        inside = module if leaf in FUSED else module.rpartition(".")[0]
        if not projection or not ATTENTION.search(inside) or CROSS.search(inside):
            continue
        if projection in FUSED:
            roles[projection] = name
        elif projection in OUTPUT:
            roles["o"] = name
        for role, names in SEPARATE.items():
            if projection in names:
                roles[role] = name
    fused = any(role in FUSED for role in roles)
    return roles if "o" in roles and (fused or {"q", "k", "v"} <= set(roles)) else {}


def _cut(rest: dict[str, str], heads: int, tensors: Tensors, where: str) -> LayerWeights:
    """Projections of one layer, cut into heads."""
    roles = _roles(rest)

    def get(role: str) -> Tensor:
        return _floating(tensors.get(roles[role]), roles[role], tensors.name)

    output = get("o")
    if fused := next((role for role in roles if role in FUSED), None):
        weight = get(fused)
        if weight.shape[0] < weight.shape[1]:
            weight, output = weight.T, output.T  # GPT-2's Conv1D keeps (in, out)
        width = _even(output.shape[1], heads, where, "output projection")
        layout = _layout(fused, tensors)
        q, k, v = _split(weight, heads, width, layout, where)
    else:
        q, k, v = get("q"), get("k"), get("v")
        width = _even(output.shape[1], heads, where, "output projection")
        if q.shape[0] == 2 * heads * width:  # a gate follows each head's query, as in Qwen3-Next
            q = q.reshape(heads, 2, width, -1)[:, 0].flatten(0, 1)
    if (
        q.shape[0] != heads * width
        or k.shape[0] % width
        or v.shape != k.shape
        or heads % (k.shape[0] // width)
    ):
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in (("q", q), ("k", k), ("v", v)))
        raise HeadwiseError(f"{where}: projections {shapes} do not divide into {heads} heads of {width}")
    q, k, v = (t.reshape(-1, width, t.shape[-1]) for t in (q, k, v))
    o = output.reshape(output.shape[0], heads, width).transpose(0, 1)
    return LayerWeights(*(np.ascontiguousarray(t.float().cpu().numpy()) for t in (q, k, v, o)))


def _split(weight: Tensor, heads: int, width: int, layout: str, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """A fused projection `((H + 2K)·D, d_model)` to q `(H·D, d_model)`, k and v `(K·D, d_model)`."""
    rows = weight.shape[0] - heads * width
    if rows <= 0 or rows % (2 * width):
        raise HeadwiseError(
            f"{where}: a fused projection of {weight.shape[0]} rows does not divide into {heads} query "
            f"heads of {width} and their keys and values"
        )
    kv_heads = rows // (2 * width)
    if layout == "stacked":
        q, k, v = weight.split((heads * width, kv_heads * width, kv_heads * width))
        return q, k, v
    groups = weight.reshape(kv_heads, heads // kv_heads + 2, width, -1)
    q, k, v = groups[:, :-2], groups[:, -2], groups[:, -1]
    return q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)


def _layout(fused: str, tensors: Tensors) -> str:
    """How the fused projection is laid out; a few model types differ from their projection's name."""
    config = tensors.config
    kind = config.get("model_type")
    if kind == "codegen" or (fused == "query_key_value" and kind not in BY_HEAD):
        raise HeadwiseError(
            f"{tensors.name}: how model type {kind!r} lays out its fused {fused} is not known to headwise"
        )
    if kind == "falcon" and config.get("multi_query") and not config.get("new_decoder_architecture"):
        return "stacked"
    if kind == "gpt_bigcode" and not config.get("multi_query", True):
        return "by_head"
    return FUSED[fused]


def _folded(weights: LayerWeights, gain: Array) -> LayerWeights:
    return LayerWeights(weights.q * gain, weights.k * gain, weights.v * gain, weights.o)


def _norm_before(rest: dict[str, str], tensors: Tensors) -> str | None:
    """Name of the gain of the norm before attention; None where there is none."""
    names = list(NORMS)
    if tensors.config.get("model_type") in NORM_FIRST and tensors.config.get("do_layer_norm_before", True):
        names.append("self_attn_layer_norm")
    return next((rest[f"{norm}.weight"] for norm in names if f"{norm}.weight" in rest), None)


def _norm_gain(name: str, tensors: Tensors) -> Array:
    """What that norm multiplies by, `(d_model,)`."""
    gain = tensors.get(name).float().cpu().numpy()
    return 1 + gain if tensors.config.get("model_type") in NORM_PLUS_ONE else gain


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


def _notes(tensors: Tensors, names: list[str]) -> list[str]:
    config = _text(tensors.config)
    learned = any("position_embeddings" in n or re.search(r"(^|\.)wpe\.", n) for n in tensors.names)
    rope = any("rope" in key or "rotary" in key for key, value in config.items() if value) and not learned
    biases = any(ATTENTION.search(n) and n.endswith("bias") and "norm" not in n.lower() for n in names)
    notes = _general_notes(biases=biases, rope=rope)
    if any(re.search(r"(q|k)_(norm|layernorm)\.weight$", n) for n in names):
        notes.append("the norm of each query and key is left out: it changes their length, token by token")
    if config.get("model_type") in POSITION_BIAS:
        notes.append("what positions add to the scores is left out")
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


def _head_count(config: dict[str, Any], stack: str, name: str) -> int:
    side = next((s for s in ("encoder", "decoder") if s in stack), "")
    inner = config.get("vision_config") if "vis" in stack else _text(config)
    for values in (inner or {}, config):
        for key in (f"{side}_attention_heads", *HEAD_COUNTS):
            if isinstance(values.get(key), int):
                return int(values[key])
    raise HeadwiseError(
        f"{name}: its config.json does not say how many heads it has ({', '.join(HEAD_COUNTS)})"
    )


def _text(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config") or config


def _choose(stacks: dict[str, Any], asked: str | None, name: str) -> str:
    if asked is not None:
        return one_of("stack", asked, stacks)
    if len(stacks) > 1:
        raise HeadwiseError(
            f"{name} has several stacks of layers ({', '.join(stacks)}); choose one with --stack"
        )
    return next(iter(stacks))


def _nothing_found(tensors: Tensors) -> str:
    if any("kv_b_proj" in name for name in tensors.names):
        return f"{tensors.name} uses multi-head latent attention, whose keys are not one matrix per head"
    if any(name.endswith(("qweight", "weight_packed")) for name in tensors.names):
        return f"{tensors.name} holds quantised weights; use the checkpoint they were made from"
    return f"{tensors.name}: none of its {len(tensors.names)} tensors is named as an attention projection"


def _floating(tensor: Tensor, name: str, source: str) -> Tensor:
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise HeadwiseError(
            f"{source}: {name} is quantised ({str(tensor.dtype).removeprefix('torch.')}); "
            "use the checkpoint it was made from"
        )
    return tensor.detach()


def _even(size: int, heads: int, where: str, what: str) -> int:
    if size % heads:
        raise HeadwiseError(f"{where}: the {what}'s {size} rows do not divide into {heads} heads")
    return size // heads


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:4])) + (" …" if len(layers) > 4 else "")
