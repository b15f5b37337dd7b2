"""Every layer of the installed flash-linear-attention: built on any machine, trained for a step on a GPU.

`pip install 'headwise[fla]'`, then `pytest tests/attention/fla`.
"""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

from headwise.attention import AttentionConfig, AttentionShape
from headwise.attention.fla import PACKAGE, FlaConfig, build, layers
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder

installed = importlib.util.find_spec("fla") is not None
pytestmark = pytest.mark.skipif(not installed, reason="flash-linear-attention is not installed")
names = sorted(layers(importlib.import_module(PACKAGE))) if installed else []

OTHER = {"mamba2": "{num_heads: 8, head_dim: 32}"}
"""Arguments of layers that d_model and the heads do not suit."""

NEEDS_FLASH_ATTN = {"attn", "mla"}

LEARN = ("gated_deltanet", "gla", "delta_net", "forgetting_attn", "linear_attn", "kda", "hgrn2", "rwkv7")


@pytest.mark.parametrize("name", names)
def test_a_layer_is_built_or_names_the_package_that_it_lacks(name: str) -> None:
    shape = AttentionShape(128, 4, 4, 32, layer=1, n_layers=2)
    options = FlaConfig(name, OTHER.get(name, "{}"))
    if name in NEEDS_FLASH_ATTN and importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(HeadwiseError, match="Please install Flash Attention"):
            build(shape, options)
        return
    if name == "YOCOCrossAttention":
        with pytest.raises(HeadwiseError, match="also needs shared_k"):
            build(shape, options)
        return
    _, layer = build(shape, options)
    assert sum(parameter.numel() for parameter in layer.parameters()) >= 2 * 128 * 128


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LEARN)
def test_a_layer_learns_in_bfloat16(name: str) -> None:
    torch.manual_seed(0)
    attention = AttentionConfig(kind="fla", fla=FlaConfig(name))  # type: ignore[call-arg]
    config = ModelConfig(d_model=128, n_heads=2, vocab_size=16, position="none", attention=attention)
    config.validate()
    model = Decoder(config, 128).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    tokens = torch.randint(16, (8, 64), device="cuda").repeat(1, 2)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(value == value for value in losses)
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert model(tokens).isfinite().all()
