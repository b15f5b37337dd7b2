"""Weights of other programs in this project's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.model.decoder import Decoder

NANOGPT = {
    "transformer.wte.weight": "tokens.weight",
    "transformer.wpe.weight": "positions.weight",
    "transformer.ln_f": "norm",
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


def from_nanogpt(state: dict[str, Tensor], model: Decoder, source: str) -> dict[str, Tensor]:
    """Rename the weights of a nanoGPT checkpoint. Its fused qkv has the order of this project's.

    nanoGPT computes the exact GELU, and before June 2023 GPT-2's approximation: the weights do not say which.

    Raises:
        HeadwiseError: a weight that nanoGPT does not have, or a model that cannot hold them.
    """
    config = model.config
    needed = {"position": ("learned",), "norm": ("layernorm",), "mlp": ("gelu", "gelu_tanh")}
    for key, values in needed.items():
        if (value := getattr(config, key)) not in values:
            wanted = " or ".join(values)
            raise HeadwiseError(
                f"{source} has the nanoGPT layout, which needs model.{key}={wanted}; it is {value}"
            )
    renamed = {}
    for name, value in state.items():
        if name == "lm_head.weight" and config.tie_embeddings:
            _check_tied(state, source)
            continue
        if name.endswith(".attn.bias") and value.dim() == 4:  # the causal mask of old versions
            continue
        renamed[_rename(name, source)] = value
    return renamed


def shape_of_nanogpt(state: dict[str, Tensor], source: str) -> dict[str, Any]:
    """The keys of `model` that a nanoGPT checkpoint's tensors tell: all but the number of heads.

    Raises:
        HeadwiseError: it has not the tensors that every such checkpoint has.
    """
    try:
        tokens, positions = (state[f"transformer.{name}.weight"] for name in ("wte", "wpe"))
        hidden = state["transformer.h.0.mlp.c_fc.weight"].shape[0]
    except KeyError as error:
        raise HeadwiseError(f"{source} has no nanoGPT layout: it lacks {error}") from None
    output = state.get("lm_head.weight")
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.h.")}
    return {
        "d_model": tokens.shape[1],
        "n_layers": len(layers),
        "d_ff": hidden,
        "vocab_size": tokens.shape[0],
        "max_seq_len": positions.shape[0],
        "norm": "layernorm",
        "mlp": "gelu",
        "position": "learned",
        "tie_embeddings": output is None or torch.equal(output, tokens),
        "bias": "transformer.h.0.attn.c_attn.bias" in state,
    }


def _check_tied(state: dict[str, Tensor], source: str) -> None:
    tokens = state.get("transformer.wte.weight")
    if tokens is not None and not torch.equal(tokens, state["lm_head.weight"]):
        raise HeadwiseError(
            f"{source} has an output layer of its own, and model.tie_embeddings is true; "
            "set model.tie_embeddings=false to keep it"
        )


def _rename(name: str, source: str) -> str:
    if name == "lm_head.weight":
        return "head.weight"
    if name in NANOGPT:
        return NANOGPT[name]
    stem, _, leaf = name.rpartition(".")
    if stem in NANOGPT:
        return f"{NANOGPT[stem]}.{leaf}"
    if stem.startswith("transformer.h."):
        layer, _, part = stem.removeprefix("transformer.h.").partition(".")
        if part in NANOGPT and layer.isdecimal():
            return f"blocks.{layer}.{NANOGPT[part]}.{leaf}"
    raise HeadwiseError(f"{source} has no nanoGPT layout: it holds {name!r}")
