"""Kinds whose weights are products of features: engines, measures, decoding, FLOPs, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headwise.attention import KINDS, Attention, AttentionConfig, AttentionShape
from headwise.attention.linear import layer as linear_layer
from headwise.attention.observation import Unmeasured, Weights
from headwise.attention.performer import PerformerAttention, PerformerConfig
from headwise.config.run import from_dict
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.count import forward_flops_by_part
from headwise.model.decoder import Decoder
from headwise.model.generate import make_cache, read

both = pytest.mark.parametrize("kind", ["linear", "performer"])


def make(kind: str, **sizes: Any) -> Attention:
    shape = AttentionShape(**({"d_model": 12, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6} | sizes))
    return KINDS[kind](shape, AttentionConfig(kind=kind).options()).double().eval()


@both
@torch.no_grad()
def test_the_observed_weights_are_those_that_attend(kind: str) -> None:
    layer, seen, entering = make(kind), [], []
    layer.observer = seen.append
    layer.out.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    x = torch.randn(2, 140, 12, dtype=torch.float64)
    mask = torch.ones(2, 140, 140, dtype=torch.bool)
    mask[0, :, :9] = False
    for given in (None, mask):
        layer(x, attn_mask=given)
        weights = seen.pop()
        assert isinstance(weights, Weights)
        y = weights.weights @ layer.heads(x)[2].repeat_interleave(2, 1)
        torch.testing.assert_close(entering.pop(), y.transpose(1, 2).flatten(2))


@both
@torch.no_grad()
def test_padding_stays_in_blocks_and_other_masks_do_not(kind: str) -> None:
    layer, x = make(kind), torch.randn(2, 9, 12, dtype=torch.float64)
    padding = torch.ones(2, 9, 9, dtype=torch.bool)
    padding[1, :, :4] = False
    layer(x, attn_mask=padding)
    assert (layer.engine, layer.fallback(2, 9)) == (f"{kind}-blocks", None)
    window = torch.ones(1, 9, 9, dtype=torch.bool).triu(-2)
    layer(x, attn_mask=window)
    assert layer.engine == f"{kind}-plain"
    assert "does not hide the same keys from all queries" in str(layer.fallback(2, 9))


@both
def test_too_many_weights_are_not_measured_and_the_reason_is_given(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_layer, "MOST_WEIGHTS", 100)
    layer, seen = make(kind), []
    layer.observer = seen.append
    layer(torch.randn(2, 9, 12, dtype=torch.float64))
    assert isinstance(seen[0], Unmeasured)
    assert "2 x 4 x 9 x 9 weights are too many" in seen[0].reason


@both
@pytest.mark.parametrize("n_kv_heads", [1, 4])
def test_flops_over_several_blocks_as_pytorch_counts_them(kind: str, n_kv_heads: int) -> None:
    config = ModelConfig(
        d_model=16, n_heads=4, n_kv_heads=n_kv_heads, n_layers=1, vocab_size=8,
        attention=AttentionConfig(kind=kind),
    )  # fmt: skip
    model, tokens = Decoder(config, 384), torch.randint(8, (2, 384))
    with FlopCounterMode(display=False) as forward:
        model(tokens)
    assert forward.get_total_flops() == tokens.numel() * sum(forward_flops_by_part(model, 384).values())


@both
@torch.no_grad()
def test_decoding_past_a_block_gives_the_logits_of_the_whole_and_holds_no_more(kind: str) -> None:
    config = ModelConfig(
        d_model=16, n_heads=2, n_layers=1, vocab_size=11, init_std=0.4, attention=AttentionConfig(kind=kind)
    )
    model, tokens = Decoder(config, 140).eval(), torch.randint(11, (1, 140))
    cache = make_cache(model, 1, 140)
    torch.testing.assert_close(read(model, cache, tokens), model(tokens), atol=2e-4, rtol=1e-3)
    assert make_cache(model, 1, 9000).nbytes == cache.nbytes


@both
def test_it_learns_under_autocast_without_nan(kind: str) -> None:
    config = ModelConfig(
        d_model=32, n_heads=4, n_layers=1, vocab_size=8, attention=AttentionConfig(kind=kind)
    )
    model = Decoder(config, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, losses = torch.randint(8, (8, 8)).repeat(1, 2), []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@both
def test_compiled_code_computes_the_same(kind: str) -> None:
    layer, x = make(kind), torch.randn(2, 140, 12, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    mask = torch.ones(1, 140, 140, dtype=torch.bool)
    mask[..., :3] = False
    torch.testing.assert_close(compiled(x, attn_mask=mask), layer(x, attn_mask=mask))
    torch._dynamo.reset()


def directions(model: Decoder) -> list[Tensor]:
    return [layer.directions for layer in model.attentions() if isinstance(layer, PerformerAttention)]


def test_directions_are_drawn_from_their_seed_differ_by_layer_and_are_saved() -> None:
    def build(seed: int) -> Decoder:
        attention = AttentionConfig(kind="performer", performer=PerformerConfig(20, seed))  # type: ignore[call-arg]
        return Decoder(ModelConfig(d_model=16, n_heads=2, vocab_size=8, attention=attention), 8)

    one, same, other = build(1), build(1), build(2)
    assert directions(one)[0].shape == (20, 8)
    assert torch.equal(directions(one)[0], directions(same)[0])
    assert not torch.equal(*directions(one))
    assert not torch.equal(directions(one)[0], directions(other)[0])
    other.load_state_dict(one.state_dict())
    assert torch.equal(directions(one)[0], directions(other)[0])


@both
def test_what_needs_keys_or_a_softmax_is_refused(kind: str) -> None:
    layer, x = make(kind), torch.randn(1, 4, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"'{kind}' does not support additive_mask"):
        layer(x, attn_mask=torch.zeros(1, 4, 4))
    assert "no key can be dropped" in str(layer.whole_context_only())
    with pytest.raises(ValueError, match="3 slots for 9 tokens"):
        layer.cache(1, 3, 9, x)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("features", 0, "at least 1"), ("features", 10**6, "at most 16384"), ("seed", -1, "at least 0")],
)
def test_values_without_a_meaning_are_refused(key: str, value: int, message: str) -> None:
    with pytest.raises(HeadwiseError, match=f"performer.{key} is {value}; it must be {message}"):
        from_dict({f"model.attention.performer.{key}": value, "training.max_steps": 1})
