"""What a model holds and what it costs: parameters and FLOPs, part by part.

FLOPs are those of matrix products, two per multiply-add, with what a kind's options add; scores and
values are counted over all `seq_len` keys although half are masked, and the backward pass as twice the
forward: the convention of PaLM (Chowdhery et al. 2022, appendix B), of nanoGPT, and so of most
published numbers. A kind whose core has another backward pass states it. Otherwise what is computed is
counted: the padding of blocks, zeros beside narrow queries, and what a projection computes again in its
backward pass. tests/model/test_flops.py compares all of it with PyTorch's counter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from headwise.attention import attention_kind
from headwise.attention.projection import projections
from headwise.model.config import ModelConfig
from headwise.model.decoder import Block, Decoder

PARTS = ("embedding", "attention", "mlp", "norm", "head")


def parameters_by_part(model: Decoder) -> dict[str, int]:
    """Parameters of each part; a tied output layer is counted once, as embedding."""
    count = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():  # names a shared parameter once
        count[_part(name)] += parameter.numel()
    return count


def attention_block(config: ModelConfig) -> str:
    """The parameters of one layer's attention, and what they would be with dense projections."""
    shape, options = config.attention_shape(0), config.attention.options()
    kind = attention_kind(config.attention.kind)
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(shape, options).parameters())
    spared = kind.dense_parameters(shape, options) - kind.projection_parameters(shape, options)
    return f"{count:,} parameters" + (f", dense would be {count + spared:,}" if spared else "")


def forward_flops_by_part(model: Decoder, seq_len: int) -> dict[str, int]:
    """Forward FLOPs per token of each part, in sequences of `seq_len`, on the model's device."""
    options = model.config.attention.options()
    flops = {"attention_projections": 0, "attention_core": 0, "mlp": 0, "head": 0}
    for block in model.blocks:
        assert isinstance(block, Block)
        layer = block.attention
        flops["attention_projections"] += 2 * _products(layer, layer.idle())
        flops["attention_core"] += layer.flops_per_token(layer.shape, options, seq_len)
        flops["attention_core"] += layer.padded_flops_per_token(seq_len)
        flops["mlp"] += 2 * _products(block.mlp)
    flops["head"] += 2 * model.head.weight.numel()
    return flops


def training_flops_per_token(model: Decoder, seq_len: int) -> int:
    """Forward and backward FLOPs per token, on the model's device."""
    options = model.config.attention.options()
    flops = 3 * sum(forward_flops_by_part(model, seq_len).values())
    for block in model.blocks:
        assert isinstance(block, Block)
        layer = block.attention
        flops += layer.backward_flops_per_token(layer.shape, options, seq_len)
        flops -= 2 * layer.flops_per_token(layer.shape, options, seq_len)
        for _, part in projections(layer):
            flops += 2 * (part.backward_products_per_token() - 2 * part.products_per_token())
    return flops


def _part(name: str) -> str:
    if name.startswith(("tokens.", "positions.")):
        return "embedding"
    if name.startswith("head."):
        return "head"
    if ".attention." in name:
        return "attention"
    return "mlp" if ".mlp." in name else "norm"


def _products(module: nn.Module, idle: Sequence[nn.Module] = ()) -> int:
    """Multiply-adds of all matrices for one token."""
    matrices = (m for m in module.modules() if isinstance(m, nn.Linear) and m not in idle)
    products = sum(part.products_per_token() for _, part in projections(module))
    return products + sum(m.weight.numel() for m in matrices)
