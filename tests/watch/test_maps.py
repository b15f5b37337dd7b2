"""Attention maps: the weights that a layer attends with, whatever decides what a query sees."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headwise.attention.observation import Scores
from headwise.functional.head_stats import head_stats, weights_stats
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.watch.maps import attention_maps, weights_of

TOKENS = 12
PADDED = torch.tensor([[True] * TOKENS, [False] * 3 + [True] * 7 + [False] * 2])
DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 6 + [1] * 6])
BIAS = torch.randn(1, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"key_mask": PADDED},
        {"window": 4, "key_mask": PADDED, "bias": BIAS, "softcap": 2.0},
        {"documents": DOCUMENTS},
        {"documents": DOCUMENTS, "window": 4, "key_mask": PADDED, "bias": BIAS},
    ],
    ids=["plain", "window", "padding", "all", "documents", "documents, all"],
)
def test_maps_have_the_measures_of_the_scores(options: dict, causal: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, TOKENS, 8, generator=draw) for heads in (4, 2))
    weights = weights_of(Scores(q, k, 0.5, causal=causal, **options))
    assert weights is not None
    expected = head_stats(q, k, scale=0.5, causal=causal, **options).columns()
    for name, value in weights_stats(weights, documents=options.get("documents")).columns().items():
        torch.testing.assert_close(value, expected[name], equal_nan=True)


@torch.no_grad()
def test_every_layer_of_a_model_is_drawn_and_its_observer_kept() -> None:
    model = Decoder(ModelConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=10)).eval()
    seen: list[Scores] = []
    model.attentions()[1].observer = seen.append  # type: ignore[assignment]
    tokens = torch.arange(7)[None]
    maps = attention_maps(model, tokens)
    assert maps is not None
    assert maps.shape == (2, 4, 7, 7)
    assert not seen
    model(tokens)
    shown = weights_of(dataclasses.replace(seen[0], q_pre=None, k_pre=None))
    assert shown is not None
    torch.testing.assert_close(torch.from_numpy(maps[1]), shown[0].half())
