"""Errors of running sums during training: there for every switch, and larger for a worse sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwise.attention.selective.sums import SumError, sum_errors
from headwise.config.run import from_dict
from headwise.model.decoder import Decoder

SWITCHES: list[dict[str, Any]] = [
    {},
    {"source": "dedicated", "n_masks": 4, "mask_heads": "one_each"},
    {"source": "latent", "n_masks": 2, "latent_bias": True},
    {"source": "linear_combo", "combination_init": "head_zero_and_bias"},
    {"protection.kind": "head_two"},
    {"protection.kind": "leaky_relu"},
    {"protection.kind": "zero"},
    {"residual_logits": True},
    {"source": "dedicated", "n_masks": 2, "mask_layernorm": True},
    {"relu_leak": 1.0, "relu_after_cumsum": True},
]


def model(**switches: Any) -> Decoder:
    values = {
        "model.vocab_size": 16, "model.d_model": 32, "model.n_layers": 2, "model.n_heads": 4,
        "model.init_std": 0.3, "model.attention.kind": "selective", "training.max_steps": 1,
    }  # fmt: skip
    keys = {f"model.attention.selective.{key}": value for key, value in switches.items()}
    torch.manual_seed(0)
    return Decoder(from_dict(values | keys).model).eval()


def errors(tokens: int = 12, **switches: Any) -> list[SumError]:
    generator = torch.Generator().manual_seed(1)
    return sum_errors(model(**switches), torch.randint(16, (1, tokens), generator=generator))


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_selecting_layer_has_an_error_of_float32(switches: dict[str, Any]) -> None:
    found = errors(**switches)
    assert [one.layer for one in found] == [0, 1]
    for one in found:
        assert one.largest > 0
        assert one.gradient_largest > 0
        assert one.error <= 1e-4 * one.largest
        assert one.gradient_error <= 1e-3 * one.gradient_largest


def test_a_sum_one_after_another_is_worse_and_one_in_float64_has_no_error() -> None:
    exact, torch_sum, sequential = (errors(400, accumulate=how) for how in ("float64", "torch", "sequential"))
    for none, little, much in zip(exact, torch_sum, sequential, strict=True):
        # float64 rounds once: F is handed on in float32
        assert none.error <= 1e-6 * none.largest
        assert none.gradient_error <= 1e-6 * none.gradient_largest
        assert much.error > 1.5 * little.error
        assert little.largest == pytest.approx(much.largest, rel=1e-5)


def test_looking_changes_nothing() -> None:
    own, tokens = model(), torch.randint(16, (1, 9))
    with torch.no_grad():
        before = own(tokens)
        sum_errors(own, tokens)
        assert torch.equal(own(tokens), before)
    for attention in own.attentions():
        assert attention.observer is None
        assert "mask_of" not in vars(attention)


def test_without_selection_there_is_nothing_to_measure() -> None:
    assert errors(enabled=False) == []
