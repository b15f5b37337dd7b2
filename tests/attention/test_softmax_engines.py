"""Softmax attention is one function: its three engines against the definition and PyTorch's own layer."""

from __future__ import annotations

import pytest
import torch
from attention_layers import (
    BATCH,
    CLOSE,
    LENGTH,
    entering_output,
    inputs,
    make,
    masks_for,
    random_mask,
    rope_of,
)
from torch import Tensor, nn

from headwise.attention import Attention
from headwise.attention.observation import Scores

SOFTMAX = ("mha", "flash", "flex")


def definition(layer: Attention, x: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """Softmax attention in float64, query by query and head by head, as it is written in the papers."""
    shape = layer.shape
    batch, length, _ = x.shape
    q, k, v = (heads.double() for heads in layer.heads(x))
    y = torch.zeros(batch, length, shape.n_heads, shape.head_dim, dtype=torch.float64)
    for h in range(shape.n_heads):
        served_by = h // (shape.n_heads // shape.n_kv_heads)
        for i in range(length):
            keys = range(i + 1) if causal else range(length)
            logits = torch.stack([(q[:, h, i] * k[:, served_by, j]).sum(-1) for j in keys], -1)
            logits = logits * layer.scale
            if mask is not None:
                row = mask.expand(batch, -1, -1)[:, i, : len(keys)]
                logits = logits.masked_fill(~row, -torch.inf) if mask.dtype == torch.bool else logits + row
            weights = logits.softmax(-1).nan_to_num(0.0)
            y[:, i, h] = (weights[..., None] * v[:, served_by, : len(keys)]).sum(1)
    return y.flatten(2) @ layer.out.weight.double().T


@pytest.mark.parametrize("kind", SOFTMAX)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_kv_heads", [1, 2])
@torch.no_grad()
def test_softmax_engines_agree_with_the_definition(kind: str, causal: bool, n_kv_heads: int) -> None:
    layer = make(kind, n_kv_heads=n_kv_heads)
    layer.scale *= 0.7
    x = inputs(layer)
    for mask in masks_for(kind):
        if mask is not None:  # a query that sees nothing, and one that sees nothing of the past
            mask[0, 3] = False if mask.dtype == torch.bool else -torch.inf
            mask[1, 5, :6] = False if mask.dtype == torch.bool else -torch.inf
        exact = definition(layer, x, mask, causal=causal)
        y = layer(x, attn_mask=mask, causal=causal)
        torch.testing.assert_close(y.double(), exact, **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_mha_is_multihead_attention_of_pytorch(causal: bool, bias: bool) -> None:
    layer = make("mha", d_model=24, bias=bias).double()
    theirs = nn.MultiheadAttention(24, 4, bias=bias, batch_first=True).double().eval()
    pairs = [(theirs.in_proj_weight, layer.qkv.weight), (theirs.out_proj.weight, layer.out.weight)]
    pairs += [(theirs.in_proj_bias, layer.qkv.bias), (theirs.out_proj.bias, layer.out.bias)] if bias else []
    for target, source in pairs:
        target.copy_(source)
    x, mask = inputs(layer).double(), random_mask(batch=1)
    visible = mask[0].tril() if causal else mask[0]
    expected, weights = theirs(x, x, x, attn_mask=~visible, average_attn_weights=False)
    assert weights.shape == (BATCH, 4, LENGTH, LENGTH)
    torch.testing.assert_close(layer(x, attn_mask=mask, causal=causal), expected)


@pytest.mark.parametrize("kind", SOFTMAX)
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_offered_scores_reproduce_the_output(kind: str, causal: bool) -> None:
    layer, seen = make(kind, n_heads=6, n_kv_heads=2), []
    layer.observer = seen.append
    x = inputs(layer)
    for mask in masks_for(kind):
        core, _ = entering_output(layer, x, attn_mask=mask, causal=causal, rope=rope_of(layer))
        scores: Scores = seen.pop()
        k = scores.k.repeat_interleave(3, dim=1)
        logits = scores.scale * scores.q @ k.transpose(-2, -1)
        logits = logits if scores.bias is None else logits + scores.bias
        if scores.causal:
            logits = logits.masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf)
        v = layer.heads(x)[2].repeat_interleave(3, dim=1)
        expected = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(core, expected, **CLOSE)
        assert scores.q_pre is not None
        torch.testing.assert_close(rope_of(layer)(scores.q_pre, scores.k_pre), (scores.q, scores.k), **CLOSE)
