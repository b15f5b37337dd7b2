"""Weights of other programs in this project's names."""

from __future__ import annotations

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

    Raises:
        HeadwiseError: a weight that nanoGPT does not have, or a model that cannot hold them.
    """
    config = model.config
    wanted = {"model.position": (config.position, "learned"), "model.norm": (config.norm, "layernorm")}
    wanted["model.mlp"] = (config.mlp, "gelu")
    for key, (value, needed) in wanted.items():
        if value != needed:
            raise HeadwiseError(f"{source} has the nanoGPT layout, which needs {key}={needed}; it is {value}")
    renamed = {}
    for name, value in state.items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        if name.endswith(".attn.bias") and value.dim() == 4:  # the causal mask of old versions
            continue
        renamed[_rename(name, source)] = value
    return renamed


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
        if part in NANOGPT and layer.isdigit():
            return f"blocks.{layer}.{NANOGPT[part]}.{leaf}"
    raise HeadwiseError(f"{source} has no nanoGPT layout: it holds {name!r}")
