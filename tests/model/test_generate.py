"""Decoding token by token is the parallel pass: logits, losses and texts, for every switch and budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.attention import Attention, AttentionShape
from headwise.attention.cache import groups
from headwise.attention.config import AttentionConfig
from headwise.attention.selective.config import ProtectionConfig, SelectiveConfig
from headwise.errors import HeadwiseError
from headwise.functional.budget import keys_of_share
from headwise.model.budget import within_budget
from headwise.model.cache import Cache
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.model.generate import choose, decode_step, generate, make_cache, read

TOKENS, VOCAB, HEADS = 12, 20, 4

SWITCHES: dict[str, dict[str, Any]] = {
    "head_zero": {},
    "dedicated": {"source": "dedicated"},
    "two masks": {"source": "dedicated", "n_masks": 2, "mask_heads": "one_each"},
    "three masks": {"source": "dedicated", "n_masks": 3, "mask_heads": "one_each"},
    "mask per head": {"source": "dedicated", "n_masks": 4},
    "combination": {"source": "linear_combo", "combination_init": "head_zero_and_bias"},
    "combinations": {"source": "linear_combo", "n_masks": 2},
    "latent": {"source": "latent", "n_masks": 2, "latent_init": "ones", "latent_bias": True},
    "latent heads": {"source": "latent", "n_masks": 3, "mask_heads": "one_each", "latent_init": "inverse"},
    "unprotected": {"protect_bos": False, "protect_self": False},
    "leaky": {"relu_leak": 0.25},
    "relu moved": {"relu_leak": 1.0, "relu_after_cumsum": True},
    "residual": {"residual_logits": True},
    "residual, two masks": {"residual_logits": True, "source": "dedicated", "n_masks": 2},
    "residual, leaky protection": {"residual_logits": True, "protection": ProtectionConfig("leaky_relu")},
    "float64": {"accumulate": "float64"},
    "disabled": {"enabled": False},
} | {
    f"game {kind}": {"protection": ProtectionConfig(kind, bias=0.1)}
    for kind in ("zero", "head_two", "linear_combo", "leaky_relu", "big_constant")
} | {
    "game of two masks": {
        "source": "dedicated", "n_masks": 2, "protection": ProtectionConfig("head_two", scale=0.5),
    },
    "game of combinations": {
        "source": "dedicated", "n_masks": 2, "protection": ProtectionConfig("linear_combo_head_two"),
    },
}  # fmt: skip


def make(
    kind: str = "selective", n_kv_heads: int = HEADS, position: str = "rope", **switches: Any
) -> Decoder:
    """Two layers whose queries mask much, in float64 so that rounding decides no tie."""
    torch.manual_seed(0)
    attention = AttentionConfig(kind, selective=SelectiveConfig(**switches))
    config = ModelConfig(
        d_model=32, n_layers=2, n_heads=HEADS, n_kv_heads=n_kv_heads, vocab_size=VOCAB, init_std=0.3,
        position=position, attention=attention,
    )  # fmt: skip
    model = Decoder(config, TOKENS).eval()
    for attention_layer in model.attentions():
        for name in attention_layer.lr_multipliers():
            torch.nn.init.normal_(getattr(attention_layer, name), std=0.7)
    return model.double()


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def decoded(model: Decoder, slots: int) -> Tensor:
    return read(model, make_cache(model, 2, TOKENS, slots), tokens())


@pytest.mark.parametrize("n_kv_heads", [HEADS, 2])
@pytest.mark.parametrize("switches", list(SWITCHES.values()), ids=list(SWITCHES))
@torch.no_grad()
def test_decoding_is_the_pruned_evaluation_at_every_budget(switches: dict[str, Any], n_kv_heads: int) -> None:
    model = make(n_kv_heads=n_kv_heads, **switches)
    bos = switches.get("protect_bos", True)
    shares = (1.0, 0.34, 0.17) if switches.get("enabled", True) else (1.0,)
    for share in shares:
        with within_budget(model, share):
            parallel = model(tokens())
        found = decoded(model, keys_of_share(share, TOKENS, bos))
        torch.testing.assert_close(found, parallel, atol=1e-5, rtol=1e-5)
        loss = F.cross_entropy(found[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
        expected = F.cross_entropy(parallel[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
        torch.testing.assert_close(loss, expected)


@torch.no_grad()
def test_layers_that_do_not_select_are_decoded_beside_those_that_do() -> None:
    model = make(residual_logits=True, layers=[1])
    torch.testing.assert_close(decoded(model, TOKENS), model(tokens()), atol=1e-5, rtol=1e-5)
    with pytest.raises(HeadwiseError, match="layer 0 cannot hold a share"), within_budget(model, 0.5):
        pass


@pytest.mark.parametrize("masks", [1, 2])
@torch.no_grad()
def test_one_key_value_head_serves_all_masks(masks: int) -> None:
    model = make(n_kv_heads=1, source="linear_combo", n_masks=masks)
    with within_budget(model, 0.34):
        torch.testing.assert_close(decoded(model, 4), model(tokens()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "none"])
@pytest.mark.parametrize("kind", ["flash", "mha", "flex"])
@torch.no_grad()
def test_kinds_without_f_keep_a_window(kind: str, position: str) -> None:
    model = make(kind, n_kv_heads=2, position=position)
    for share in (1.0, 0.25):
        with within_budget(model, share):
            parallel = model(tokens())
        torch.testing.assert_close(decoded(model, int(share * TOKENS)), parallel, atol=1e-5, rtol=1e-5)


def rewritten(model: Decoder, prompt: Tensor, n_tokens: int, **how: Any) -> Tensor:
    """The same text by reading everything again for every token."""
    text = prompt
    for _ in range(n_tokens):
        text = torch.cat((text, choose(model(text)[:, -1], **how)[:, None]), dim=1)
    return text[:, prompt.shape[1] :]


@pytest.mark.parametrize("kind", ["selective", "flash"])
@torch.no_grad()
def test_the_full_cache_writes_the_text_of_full_passes(kind: str) -> None:
    model, prompt = make(kind), tokens()[:, :4]
    for how in ({}, {"temperature": 1.3}, {"temperature": 0.8, "top_k": 5}):
        drawn = [{"generator": torch.Generator().manual_seed(3)} if how else {} for _ in range(2)]
        cache = make_cache(model, 2, TOKENS)
        assert torch.equal(
            generate(model, cache, prompt, 8, **how, **drawn[0]),  # type: ignore[arg-type]
            rewritten(model, prompt, 8, **how, **drawn[1]),
        )


def test_top_k_draws_among_the_likeliest_alone() -> None:
    logits = torch.arange(10.0).repeat(200, 1)
    assert set(choose(logits, temperature=5.0, top_k=3).tolist()) == {7, 8, 9}


@torch.no_grad()
def test_dropped_keys_free_their_memory() -> None:
    model = make(source="dedicated", protection=ProtectionConfig("head_two"))
    full, quarter = make_cache(model, 2, 64), make_cache(model, 2, 64, 16)
    assert quarter.nbytes * 4 == full.nbytes
    before = quarter.nbytes
    for _ in range(5):
        read(model, quarter, tokens())
    assert quarter.nbytes == before
    assert quarter.layers[0].k.shape[3] == 16


def test_a_slot_holds_no_more_than_its_key_needs() -> None:
    numbers = HEADS * 8 * 2  # k and v of every head, of width 8
    for kind, switches, further in (
        ("flash", {}, 0), ("selective", {}, 0), ("selective", {"source": "linear_combo"}, 0),
        ("selective", {"source": "dedicated"}, 8),
    ):  # fmt: skip
        layer = make_cache(make(kind, **switches), 1, 10).layers[0]
        f = 0 if kind == "flash" else 4
        assert layer.nbytes == 10 * (8 * (numbers + further) + 4 + f), (kind, switches)


@torch.no_grad()
def test_a_step_compiles_whole() -> None:
    """No graph breaks, no shapes that change, nothing read back: what a CUDA graph needs."""
    torch._dynamo.reset()
    for switches in ({}, {"source": "dedicated", "n_masks": 2, "protection": ProtectionConfig("zero")}):
        model = make(**switches)
        step = torch.compile(decode_step, backend="eager", fullgraph=True, dynamic=False)
        cache, again = (make_cache(model, 2, TOKENS, 4) for _ in range(2))
        for column in tokens().unbind(1):
            torch.testing.assert_close(step(model, cache, column), decode_step(model, again, column))


def test_heads_share_slots_where_they_share_masks() -> None:
    assert groups(4, 4, 1) == ([[0, 1, 2, 3]], [[0]], [[[0]] * 4])
    assert groups(4, 4, 2).heads == [[0, 1], [2, 3]]
    assert groups(5, 5, 2).heads == [[0], [1], [2], [3], [4]]  # head 4 wraps to mask 0: unequal groups
    several = groups(12, 4, 5)
    assert several.heads == [[0], [1], [2], [3]]
    assert several.masks == [[0, 1, 1], [1, 2, 2], [3, 4, 4], [0, 1, 4]]
    assert several.own[3] == [[2, 0, 1]]


def test_what_cannot_be_decoded_is_refused() -> None:
    with pytest.raises(HeadwiseError, match="queries still to come"):
        make_cache(make(source="dedicated", n_masks=2, mask_layernorm=True), 1, 8)
    with pytest.raises(ValueError, match="1 slots are too few"):
        make_cache(make(), 1, 8, 1)
    with pytest.raises(ValueError, match="learned positions"):
        make_cache(make("flash", position="learned"), 1, TOKENS + 1)
    shapeless = Attention(AttentionShape(8, 2, 2, 4))
    shapeless.kind = "linear"  # type: ignore[misc]
    with pytest.raises(HeadwiseError, match="'linear' has no cache"):
        Cache([shapeless], 1, 4, 4, torch.empty(0))
