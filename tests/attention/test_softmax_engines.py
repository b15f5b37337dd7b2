"""Softmax attention is one function: its three engines against the definition and PyTorch's own layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headwise.attention import KINDS, Attention, AttentionShape
from headwise.attention.observation import Scores
from headwise.model.rope import Rope

SOFTMAX = ("mha", "flash", "flex")

BATCH, LENGTH, D_MODEL, N_HEADS, HEAD_DIM = 3, 9, 24, 4, 6

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
"""Two float32 computations of one thing: the outputs below are of size 1 and differ by 3e-6 at worst."""


def make(kind: str, n_kv_heads: int, *, bias: bool = False) -> Attention:
    return KINDS[kind](AttentionShape(D_MODEL, N_HEADS, n_kv_heads, HEAD_DIM, bias=bias)).eval()


def inputs() -> Tensor:
    """Wide enough that logits spread over a few units and weights are far from uniform."""
    return 3 * torch.randn(BATCH, LENGTH, D_MODEL)


def random_mask() -> Tensor:
    """Half of the keys hidden, one query that sees nothing, and one that sees nothing of the past."""
    mask = (torch.rand(BATCH, LENGTH, LENGTH) < 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    mask[0, 3] = False
    mask[1, 5, :6] = False
    return mask


def masks() -> list[Tensor | None]:
    """None, boolean, additive, and one for the whole batch."""
    mask = random_mask()
    return [None, mask, torch.randn(mask.shape).masked_fill(~mask, -torch.inf), mask[:1]]


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
    layer, x = make(kind, n_kv_heads), inputs()
    layer.scale *= 0.7
    for mask in masks():
        exact = definition(layer, x, mask, causal=causal)
        y = layer(x, attn_mask=mask, causal=causal)
        torch.testing.assert_close(y.double(), exact, **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_mha_is_multihead_attention_of_pytorch(causal: bool, bias: bool) -> None:
    layer = make("mha", N_HEADS, bias=bias).double()
    theirs = nn.MultiheadAttention(D_MODEL, N_HEADS, bias=bias, batch_first=True).double().eval()
    pairs = [(theirs.in_proj_weight, layer.qkv.weight), (theirs.out_proj.weight, layer.out.weight)]
    pairs += [(theirs.in_proj_bias, layer.qkv.bias), (theirs.out_proj.bias, layer.out.bias)] if bias else []
    for target, source in pairs:
        target.copy_(source)
    x, mask = inputs().double(), random_mask()[2:]  # theirs gives NaN to a query that sees nothing
    visible = mask[0].tril() if causal else mask[0]
    expected, weights = theirs(x, x, x, attn_mask=~visible, average_attn_weights=False)
    assert weights.shape == (BATCH, N_HEADS, LENGTH, LENGTH)
    torch.testing.assert_close(layer(x, attn_mask=mask, causal=causal), expected)


@pytest.mark.parametrize("kind", SOFTMAX)
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_offered_scores_reproduce_the_output(kind: str, causal: bool) -> None:
    group = 2
    layer, rope, x = make(kind, N_HEADS // group), Rope(HEAD_DIM), inputs()
    entering, seen = [], []
    layer.out.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    layer.observer = seen.append
    for mask in masks():
        layer(x, attn_mask=mask, causal=causal, rope=rope)
        scores: Scores = seen.pop()
        logits = scores.scale * scores.q @ scores.k.repeat_interleave(group, dim=1).transpose(-2, -1)
        logits = logits if scores.bias is None else logits + scores.bias
        if scores.causal:
            logits = logits.masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf)
        v = layer.heads(x)[2].repeat_interleave(group, dim=1)
        expected = (logits.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(entering.pop(), expected, **CLOSE)
        assert scores.q_pre is not None
        torch.testing.assert_close(rope(scores.q_pre, scores.k_pre), (scores.q, scores.k), **CLOSE)
