"""Measures of windows: of any layer with weights, the same as of the weights themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from headwise.attention import AttentionConfig
from headwise.errors import HeadwiseError
from headwise.functional.entanglement import entanglement_entropy, regional_entropy
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.watch import windows
from headwise.watch.windows import draw_windows, measure_windows, sparsity


def model_of(kind: str = "mha", **sizes: object) -> Decoder:
    values = {"d_model": 24, "n_layers": 2, "n_heads": 4, "vocab_size": 31, "init_std": 0.4} | sizes
    return Decoder(ModelConfig(**values, attention=AttentionConfig(kind)), 32).eval()


@pytest.mark.parametrize("kind", ["mha", "flash", "selective"])
def test_means_over_windows_are_those_of_the_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.watch.maps import weights_of

    model = model_of(kind, n_kv_heads=2)
    tokens = torch.randint(31, (5, 12))
    monkeypatch.setattr(windows, "AT_ONCE", 2 * windows.USUAL_HEADS * 12 * 12)  # two windows a pass
    found, reasons = measure_windows(model, model.hidden, tokens, n_regions=3)
    assert reasons == {}
    weights: list[Tensor] = []
    for layer in model.attentions():
        layer.observer = lambda seen: weights.append(weights_of(seen).detach())
    model(tokens)
    for layer, w in enumerate(weights):
        rows = found["layer"] == layer
        assert found["head"][rows].tolist() == [0, 1, 2, 3]
        expected = entanglement_entropy(w).mean(0).numpy()
        np.testing.assert_allclose(found["entanglement"][rows], expected, atol=1e-5)
        expected = regional_entropy(w, 3).mean((0, 2)).numpy()
        np.testing.assert_allclose(found["regional_entanglement"][rows], expected, atol=1e-5)
        np.testing.assert_allclose(found["sparsity"][rows], sparsity(w).mean(0).numpy(), atol=1e-6)


def test_sparsity_counts_the_keys_up_to_the_query() -> None:
    first = torch.zeros(4, 4)
    first[:, 0] = 1  # one key of 2, of 3 and of 4
    uniform = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]  # all keys are needed for 0.9
    found = sparsity(torch.stack((first, uniform))[None])[0]
    assert found.tolist() == pytest.approx([(1 / 2 + 2 / 3 + 3 / 4) / 3, 0])
    both_ways = torch.eye(4)[[3, 2, 1, 0]]
    assert sparsity(both_ways[None, None]).item() == pytest.approx(3 / 4)
    assert math.isnan(sparsity(torch.zeros(1, 1, 4, 4)).item())


def test_a_transformers_model_is_measured_too(hf_model, tokens: Tensor) -> None:
    model = hf_model("llama")
    found, _ = measure_windows(model, lambda ids: model(input_ids=ids), tokens, n_regions=2)
    assert found["layer"].tolist() == [0] * 4 + [1] * 4
    assert (found["entanglement"] > 0).all()
    assert (found["entanglement"] <= math.log(24)).all()


def test_a_kind_without_weights_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.attention.observation import Margins

    model = model_of()
    for layer in model.attentions():
        monkeypatch.setattr(layer, "observation", lambda *args, **kw: Margins(torch.ones(1, 4, 8)))
    with pytest.raises(HeadwiseError, match="offers margins and no attention weights"):
        measure_windows(model, model.hidden, torch.randint(31, (1, 8)), n_regions=2)


def test_windows_are_runs_of_the_rows_and_the_same_for_one_seed() -> None:
    tokens = torch.arange(60).view(3, 20)
    drawn = draw_windows(tokens, 7, 50, seed=4)
    assert drawn.shape == (50, 7)
    assert (drawn.diff() == 1).all()
    assert (drawn[:, 0] % 20 <= 13).all()
    assert torch.equal(draw_windows(tokens, 7, 50, seed=4), drawn)
    assert not torch.equal(draw_windows(tokens, 7, 50, seed=5), drawn)
    assert torch.equal(draw_windows(tokens, 20, 1, seed=0)[0] % 20, torch.arange(20))
