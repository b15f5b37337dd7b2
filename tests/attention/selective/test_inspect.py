"""Attacks and masks out of a running model, for the switches that change how one comes from the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headwise.attention.config import AttentionConfig
from headwise.attention.observation import Scores
from headwise.attention.selective.config import ProtectionConfig
from headwise.attention.selective.inspect import selections
from headwise.attention.selective.layer import SelectiveConfig
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder

TOKENS = torch.randint(0, 30, (1, 12), generator=torch.Generator().manual_seed(0))


def decoder(**switches: Any) -> Decoder:
    torch.manual_seed(0)
    attention = AttentionConfig(kind="selective", selective=SelectiveConfig(**switches))
    config = ModelConfig(
        n_layers=2, n_heads=4, d_model=32, vocab_size=30, init_std=0.4, attention=attention
    )  # fmt: skip
    return Decoder(config, seq_len=12).eval()


def before_each_query(attack: np.ndarray) -> np.ndarray:
    return np.tril(np.pad(attack.cumsum(1), ((0, 0), (1, 0), (0, 0)))[:, :-1])


def seen_masks(model: Decoder) -> list[np.ndarray]:
    """F of each layer, as an observer gets it."""
    found: list[np.ndarray] = []

    def look(seen: Any) -> None:
        assert isinstance(seen, Scores)
        assert seen.taken is not None
        found.append(seen.taken[0].numpy())

    for layer in model.attentions():
        layer.observer = look
    with torch.no_grad():
        model(TOKENS)
    for layer in model.attentions():
        layer.observer = None
    return found


@pytest.mark.parametrize(
    "switches",
    [
        {}, {"protect_bos": False}, {"protect_self": False}, {"relu_leak": 0.3}, {"residual_logits": True},
        {"layers": [1]}, {"source": "dedicated", "n_masks": 2},
        {"source": "latent", "n_masks": 2, "latent_bias": True},
        {"source": "linear_combo", "accumulate": "float64"},
    ],
    ids=str,
)  # fmt: skip
def test_masks_are_those_of_the_model_and_the_sum_of_its_attacks(switches: dict[str, Any]) -> None:
    model = decoder(**switches)
    found = selections(model, TOKENS)
    assert [one.layer for one in found] == switches.get("layers", [0, 1])
    masks = seen_masks(model)
    assert not any(masks[layer].any() for layer in range(2) if layer not in switches.get("layers", [0, 1]))
    for one in found:
        np.testing.assert_array_equal(one.taken, masks[one.layer][_firsts(one.heads)])
        np.testing.assert_allclose(one.taken, before_each_query(one.attack), atol=1e-4)
        assert one.attack.any()
        assert one.unprotected is None


def _firsts(heads: list[list[int]]) -> list[int]:
    """The first head under each mask; where one mask serves all heads, an observer sees it once."""
    return [0] if len(heads) == 1 else [mine[0] for mine in heads]


def test_heads_are_listed_under_their_masks() -> None:
    (one, _) = selections(decoder(source="dedicated", n_masks=2), TOKENS)
    assert one.heads == [[0, 1], [2, 3]]


@pytest.mark.parametrize("residual", [False, True])
def test_without_protection_the_same_attacks_take_their_sum(residual: bool) -> None:
    model = decoder(protection=ProtectionConfig(kind="head_two"), residual_logits=residual)
    found = selections(model, TOKENS)
    for one, mask in zip(found, seen_masks(model), strict=True):
        assert one.unprotected is not None
        np.testing.assert_array_equal(one.taken, mask)
        np.testing.assert_allclose(one.unprotected, before_each_query(one.attack), atol=1e-4)
        assert (one.taken <= one.unprotected + 1e-4).all()
        assert (one.taken < one.unprotected - 1e-2).any()


def test_a_model_is_left_as_it_was() -> None:
    model = decoder()
    with torch.no_grad():
        before = model(TOKENS)
        selections(model, TOKENS)
        assert torch.equal(model(TOKENS), before)
    for layer in model.attentions():
        assert layer.observer is None
        assert "mask_of" not in vars(layer)


def test_layers_that_select_nothing_are_left_out() -> None:
    assert selections(decoder(enabled=False), TOKENS) == []
