"""The model without the chosen heads, checked against the model with their outputs at 0."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from headwise.config.run import Config
from headwise.errors import HeadwiseError
from headwise.model import pruning
from headwise.model.decoder import Decoder
from headwise.runs import checkpoint
from headwise.watch.effect import Speaker, speaker_of
from headwise.watch.hooks import Layer
from headwise.watch.load import Loaded
from headwise.watch.removal import removed

ROUNDING = 1e-3
"""Logits agree within this share of the largest."""

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""What transformers calls the matrix that reads the heads' outputs, inside of an attention module."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

Removed = Mapping[int, Sequence[int]]


def unit_sizes(speaker: Speaker, layers: Sequence[Layer], *, zeroed: bool) -> dict[int, int]:
    """Query heads that leave a layer together; single ones where they are only zeroed.

    Raises:
        HeadwiseError: heads of this model cannot be taken out; says why.
    """
    if zeroed:
        return {layer.number: 1 for layer in layers}
    if speaker.loaded.run is not None:
        pruning.refuse(speaker.loaded.run.model, speaker.loaded.name)
        return {layer.number: pruning.unit_size(speaker.loaded.run.model) for layer in layers}
    return {layer.number: layer.n_heads // _kv_heads(layer, speaker) for layer in layers}


def without_heads(speaker: Speaker, layers: Sequence[Layer], chosen: Removed, *, zeroed: bool) -> Speaker:
    """A model of its own without the heads.

    Args:
        chosen: query heads by layer, whole units.
        zeroed: only set what the output projection reads of them to 0.

    Raises:
        HeadwiseError: this model's weights cannot be changed so; says why.
    """
    if speaker.loaded.run is None:
        change = _zeroed_pretrained if zeroed else _smaller_pretrained
        return speaker_of(change(speaker, layers, chosen), speaker.loaded.name)
    config: Config = speaker.loaded.run
    before = cast(Decoder, speaker.loaded.model)
    weights = {name: parameter.detach() for name, parameter in before.named_parameters()}
    if zeroed:
        after, kept = config, pruning.zero(weights, config.model, chosen)
    else:
        after = replace(config, model=pruning.pruned(config.model, chosen))
        kept = pruning.prune(weights, config.model, chosen)
        after.model.validate()
    model = Decoder(after.model, config.data.seq_len).to(next(before.parameters()).device)
    _refuse_other_shapes(model, kept, config)
    checkpoint.load_weights(model, kept, speaker.loaded.name)
    model = model.to(next(before.parameters()).dtype).eval().requires_grad_(False)
    return Speaker(Loaded(speaker.loaded.name, model, after, model), True, True)


@torch.no_grad()
def check(before: Speaker, after: Speaker, layers: Sequence[Layer], chosen: Removed, tokens: Tensor) -> float:
    """The largest difference of logits to the model with the heads' outputs at 0, as a share of the largest.

    Raises:
        HeadwiseError: they differ by more than rounding, so the model's heads are not what was removed.
    """
    by_number = {layer.number: layer for layer in layers}
    with removed([(by_number[n], head) for n, heads in chosen.items() for head in heads]):
        expected = before(tokens).float()
    try:
        found = after(tokens).float()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise HeadwiseError(
            f"{before.loaded.name} cannot run with layers of different heads ({reason}); pass --zero"
        ) from error
    apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    low = before_dtype(before) in (torch.bfloat16, torch.float16)
    if not apart <= (50 * ROUNDING if low else ROUNDING):
        raise HeadwiseError(
            f"{before.loaded.name} without the heads does not compute the same as with their outputs at 0 "
            f"(logits differ by {apart:.2g} of the largest): its heads affect one another, so none can be "
            "removed"
        )
    return apart


def before_dtype(speaker: Speaker) -> torch.dtype:
    """Of the weights."""
    return next(speaker.loaded.model.parameters()).dtype


def _refuse_other_shapes(model: Decoder, kept: Mapping[str, Tensor], config: Config) -> None:
    for name, parameter in model.named_parameters():
        if name not in kept or kept[name].shape != parameter.shape:
            raise pruning.no_slices(config.model)


def _kv_heads(layer: Layer, speaker: Speaker) -> int:
    """Of a transformers layer whose projections are matrices of their own."""
    parts = [getattr(layer.module, name, None) for name in PROJECTIONS]
    if not all(isinstance(part, nn.Linear) for part in parts):
        raise HeadwiseError(
            f"{type(speaker.loaded.model).__name__} does not have separate {', '.join(PROJECTIONS)}, so its "
            "heads cannot be removed safely; pass --zero"
        )
    q, k = parts[0], parts[1]
    assert isinstance(q, nn.Linear)
    assert isinstance(k, nn.Linear)
    return k.out_features * layer.n_heads // q.out_features


def _zeroed_pretrained(speaker: Speaker, layers: Sequence[Layer], chosen: Removed) -> nn.Module:
    names = {module: name for name, module in speaker.loaded.model.named_modules()}
    model = copy.deepcopy(speaker.loaded.model)
    for layer in layers:
        if heads := chosen.get(layer.number):
            place = _output_of(layer, speaker)
            reads = model.get_submodule(f"{names[layer.module]}.{place}")
            weight = cast(Tensor, reads.weight).detach()
            matrix = weight.T if _reads_rows(reads) else weight
            width = matrix.shape[1] // layer.n_heads
            for head in heads:
                matrix[:, head * width : (head + 1) * width] = 0
    return model


def _output_of(layer: Layer, speaker: Speaker) -> str:
    for name in OUTPUTS:
        weight = getattr(getattr(layer.module, name, None), "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            inputs = weight.shape[0 if _reads_rows(layer.module.get_submodule(name)) else 1]
            if inputs % layer.n_heads == 0:
                return name
    raise HeadwiseError(
        f"{type(speaker.loaded.model).__name__} has the matrix that reads its heads outside of its attention "
        "module, so its heads cannot be removed here; `headwise intervene --remove` measures the loss "
        "without them"
    )


def _reads_rows(module: nn.Module) -> bool:
    """Whether a matrix is kept as (inputs, outputs), as GPT-2's is."""
    return type(module).__name__ == "Conv1D"


def _smaller_pretrained(speaker: Speaker, layers: Sequence[Layer], chosen: Removed) -> nn.Module:
    """A model of the same class with as many heads less in every layer: its configuration has one number."""
    before: Any = speaker.loaded.model
    counts = {layer.number: len(chosen.get(layer.number, ())) for layer in layers}
    left = {layer.n_heads - counts[layer.number] for layer in layers}
    if len(left) > 1:
        raise HeadwiseError(
            f"the configuration of {type(before).__name__} has one number of heads for all layers; pass "
            "--per-layer, which removes the same number from each, or --zero"
        )
    heads = left.pop()
    kv_heads = {heads * _kv_heads(layer, speaker) // layer.n_heads for layer in layers}
    width = {cast(nn.Linear, layer.module.q_proj).out_features // layer.n_heads for layer in layers}
    settings = before.config.to_dict() | {
        "num_attention_heads": heads, "num_key_value_heads": kv_heads.pop(), "head_dim": width.pop(),
    }  # fmt: skip
    if kv_heads or width:
        raise HeadwiseError(f"the layers of {type(before).__name__} differ in heads; pass --zero")
    names = {module: name for name, module in before.named_modules()}
    state = dict(before.state_dict())
    for layer in layers:
        _slice(state, names[layer.module], layer, chosen.get(layer.number, ()), _kv_heads(layer, speaker))
    try:
        config = type(before.config)(**settings)
        after = type(before)(config).to(before_dtype(speaker)).to(next(before.parameters()).device)
        after.load_state_dict(state)
    except Exception as error:  # a configuration refuses numbers in many ways
        reason = " ".join(str(error).split())[:200]
        raise HeadwiseError(
            f"{type(before).__name__} cannot be built with {heads} heads a layer ({reason}); pass --zero"
        ) from error
    return after


def _slice(state: dict[str, Tensor], at: str, layer: Layer, heads: Sequence[int], kv_heads: int) -> None:
    size = layer.n_heads // kv_heads
    gone = {"q_proj": set(heads), "k_proj": {h // size for h in heads}, "v_proj": {h // size for h in heads}}
    for name, some in gone.items():
        total = layer.n_heads if name == "q_proj" else kv_heads
        for leaf in ("weight", "bias"):
            key = f"{at}.{name}.{leaf}"
            if key in state:
                state[key] = _kept(state[key], total, some, 0)
    state[f"{at}.o_proj.weight"] = _kept(state[f"{at}.o_proj.weight"], layer.n_heads, set(heads), 1)


def _kept(value: Tensor, total: int, gone: set[int], axis: int) -> Tensor:
    """`value` less the equal parts of `axis` that are `gone`."""
    parts = value.chunk(total, axis)
    return torch.cat([part for at, part in enumerate(parts) if at not in gone], axis)
