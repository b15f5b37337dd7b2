"""Parameters and FLOPs by part: by hand, and as PyTorch counts them while the model runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headwise.attention import AttentionConfig
from headwise.model.config import ModelConfig
from headwise.model.count import forward_flops_by_part, parameters_by_part, training_flops_per_token
from headwise.model.decoder import Decoder

TINY = {
    "d_model": 8,
    "n_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 1,
    "head_dim": 4,
    "d_ff": 16,
    "vocab_size": 11,
}
VARIANTS = [
    {},
    {"tie_embeddings": False},
    {"mlp": "swiglu"},
    {"bias": True, "norm": "layernorm", "position": "learned"},
    {"n_kv_heads": 3, "position": "sinusoidal"},
]


def build(**values: object) -> Decoder:
    return Decoder(ModelConfig(**(TINY | values), attention=AttentionConfig(kind="mha")), seq_len=5)


def test_parameters_by_hand() -> None:
    attention = 8 * (3 + 2 * 1) * 4 + 12 * 8
    expected = {
        "embedding": 11 * 8, "attention": 2 * attention, "mlp": 2 * (2 * 8 * 16), "norm": 5 * 8, "head": 0,
    }  # fmt: skip
    assert parameters_by_part(build()) == expected
    assert parameters_by_part(build(tie_embeddings=False)) == expected | {"head": 11 * 8}
    assert parameters_by_part(build(position="learned")) == expected | {"embedding": (11 + 5) * 8}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parts_sum_to_the_model(variant: dict[str, object]) -> None:
    model = build(**variant)
    assert sum(parameters_by_part(model).values()) == sum(p.numel() for p in model.parameters())


def test_flops_by_hand() -> None:
    per_layer = {
        "attention_projections": 2 * (8 * 20 + 12 * 8),  # two per multiply-add
        "attention_core": 2 * 2 * 5 * 3 * 4,  # scores and values, 5 keys, 3 heads of 4
        "mlp": 2 * (2 * 8 * 16),
    }
    expected = {part: 2 * flops for part, flops in per_layer.items()} | {"head": 2 * 8 * 11}
    assert forward_flops_by_part(build(), seq_len=5) == expected
    assert training_flops_per_token(build(), seq_len=5) == 3 * sum(expected.values()) == 8112


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_flops_as_pytorch_counts_them(variant: dict[str, object]) -> None:
    model, tokens = build(**variant), torch.randint(11, (2, 5))
    with FlopCounterMode(display=False) as forward:
        logits = model(tokens)
    assert forward.get_total_flops() == tokens.numel() * sum(forward_flops_by_part(model, 5).values())
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == tokens.numel() * training_flops_per_token(model, 5)
