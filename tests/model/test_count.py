"""Parameters and FLOPs by part: by hand, and as PyTorch counts them while the model runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headwise.attention import KINDS, AttentionConfig
from headwise.attention.selective.config import ProtectionConfig, SelectiveConfig
from headwise.attention.selective.engines import SWITCHES
from headwise.errors import HeadwiseError
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


COUNTABLE = ("differential", "flash", "holo", "linear", "mha", "selective", "tropical")
"""Kinds whose products PyTorch's counter sees, or whose own operators have formulas for it.

It stops at FlexAttention, which is defined as `mha` is.
"""

SOURCES = {
    "head_zero": {},
    "two dedicated": {"source": "dedicated", "n_masks": 2},
    "two dedicated, one each": {"source": "dedicated", "n_masks": 2, "mask_heads": "one_each"},
    "linear_combo": {"source": "linear_combo", "n_masks": 3},
    "latent": {"source": "latent", "n_masks": 4},
    "latent, one each": {"source": "latent", "n_masks": 5, "mask_heads": "one_each", "latent_bias": True},
}


def counted(model: Decoder, tokens: torch.Tensor) -> tuple[int, int]:
    """FLOPs of a forward pass and of its backward pass, as PyTorch counts them."""
    formulas = model.attentions()[0].flop_formulas
    # In plain PyTorch: on a CPU the counter does not see the fused kernel.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False, custom_mapping=formulas) as forward:
            logits = model(tokens)
        with FlopCounterMode(display=False, custom_mapping=formulas) as backward:
            logits.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def model_with(attention: AttentionConfig, n_kv_heads: int) -> Decoder:
    sizes = TINY | {"n_heads": 4, "n_kv_heads": n_kv_heads, "head_dim": 8}
    config = ModelConfig(**sizes, attention=attention)
    config.attention.validate(n_heads=4, n_kv_heads=n_kv_heads, head_dim=8)
    return Decoder(config, seq_len=5)


def check_count(model: Decoder) -> None:
    tokens = torch.randint(11, (2, 5))
    forward, backward = counted(model, tokens)
    assert forward == tokens.numel() * sum(forward_flops_by_part(model, 5).values())
    assert forward + backward == tokens.numel() * training_flops_per_token(model, 5)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", COUNTABLE)
def test_flops_of_every_kind_as_pytorch_counts_them(kind: str, n_kv_heads: int) -> None:
    check_count(model_with(AttentionConfig(kind=kind), n_kv_heads))


def test_kinds_of_one_definition_cost_the_same() -> None:
    # performer's directions have no gradient, fla's layers are another package's; tt: tests/attention/tt
    built_in = {kind for kind in KINDS if KINDS[kind].__module__.startswith("headwise.")}
    assert built_in == {*COUNTABLE, "flex", "performer", "fla", "tt"}
    costs = [
        forward_flops_by_part(model_with(AttentionConfig(kind=kind), 2), 5)
        for kind in ("flex", "mha", "flash")
    ]
    assert costs[0] == costs[1] == costs[2]


@pytest.mark.parametrize("switch", SWITCHES)
def test_flops_of_every_switch_of_selection(switch: str) -> None:
    for options in SWITCHES[switch].values():
        few = options | ({"n_masks": 4} if options.get("n_masks", 1) > 4 else {})
        check_count(model_with(AttentionConfig(kind="selective", selective=SelectiveConfig(**few)), 2))


@pytest.mark.parametrize("source", SOURCES)
def test_flops_of_sources_with_protections_residuals_and_shared_keys(source: str) -> None:
    tried = 0
    for kind in ("none", "head_two", "linear_combo", "leaky_relu"):
        for residual, n_kv_heads, enabled in ((False, 1, True), (True, 2, True), (True, 4, False)):
            options = SelectiveConfig(
                **SOURCES[source], protection=ProtectionConfig(kind=kind), residual_logits=residual,
                enabled=enabled,
            )  # fmt: skip
            try:
                model = model_with(AttentionConfig(kind="selective", selective=options), n_kv_heads)
            except HeadwiseError:
                continue
            check_count(model)
            tried += 1
    assert tried > 8


def test_latents_cost_half_of_the_attention_core_again() -> None:
    """12 heads of 64 and 4 latents out of one more head: 2·T·12·64 beside 4·T·12·64, and the map to heads."""
    sizes = {"d_model": 768, "n_layers": 1, "n_heads": 12, "head_dim": 64, "d_ff": 64, "vocab_size": 11}

    def core(**options: object) -> int:
        selective = SelectiveConfig(**options)
        config = ModelConfig(**sizes, attention=AttentionConfig(kind="selective", selective=selective))
        return forward_flops_by_part(Decoder(config, 1024), 1024)["attention_core"]

    plain = 4 * 1024 * 12 * 64
    assert core(enabled=False) == plain
    assert core(source="latent", n_masks=4) == plain + plain // 2 + 2 * 64 * 12 * 64
