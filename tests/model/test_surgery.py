"""A head more in every layer: which inits leave the function alone, which learn, and where weights go."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.attention.config import AttentionConfig
from headwise.attention.selective.config import PenaltyConfig, ProtectionConfig, SelectiveConfig
from headwise.config.training import TrainingConfig
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.model.preservation import learns, preserved
from headwise.model.surgery import INITS, PLACES, Operation, grow, grown, initial, refuse
from headwise.training.optim import make_optimizer

VOCAB, LENGTH = 11, 7
FLASH, MHA = AttentionConfig("flash"), AttentionConfig("mha")


def selective(**switches: Any) -> AttentionConfig:
    return AttentionConfig("selective", selective=SelectiveConfig(**switches))


def shape(attention: AttentionConfig = FLASH, **values: Any) -> ModelConfig:
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, "init_std": 0.3}
    return ModelConfig(**(sizes | values), attention=attention)


def operation(before: ModelConfig, after: AttentionConfig, place: str, init: str) -> Operation:
    return Operation(before, dataclasses.replace(grown(before), attention=after), place, init)


def operated(old: Decoder, done: Operation) -> Decoder:
    new = Decoder(done.after, LENGTH).double().eval()
    with torch.no_grad():
        weights = grow(dict(old.named_parameters()), initial(new, done), done, "source")
        for name, parameter in new.named_parameters():
            parameter.copy_(weights[name])
    return new


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (3, LENGTH))


HEAD_ZERO = selective()
SAME = {
    "head_zero": HEAD_ZERO,
    "head_two": selective(source="dedicated", protection=ProtectionConfig("head_two")),
    "dedicated": selective(source="dedicated"),
    "two dedicated": selective(source="dedicated", n_masks=2),
    "three of their own": selective(source="dedicated", n_masks=3, mask_heads="one_each"),
    "combination": selective(source="linear_combo"),
    "combination at head zero": selective(source="linear_combo", combination_init="head_zero"),
    "two combinations": selective(source="linear_combo", n_masks=2, residual_logits=True),
    "protecting combination": selective(source="dedicated", protection=ProtectionConfig("linear_combo")),
    "from head two": selective(source="dedicated", protection=ProtectionConfig("linear_combo_head_two")),
    "latent": selective(source="latent", n_masks=2, latent_bias=True),
    "latent, residual": selective(source="latent", n_masks=2, residual_logits=True),
    "latent, normalised": selective(source="latent", n_masks=2, mask_layernorm=True),
}
PAIRS = {
    "flash": (FLASH, FLASH),
    "mha to flash": (MHA, FLASH),
    "to selective": (FLASH, HEAD_ZERO),
    "to leaky selective": (FLASH, selective(relu_leak=0.2, relu_after_cumsum=True)),
    "to protected selective": (FLASH, selective(protection=ProtectionConfig("head_two"))),
    "to disabled": (FLASH, selective(enabled=False)),
    "to dedicated": (FLASH, selective(source="dedicated")),
    "to combination": (FLASH, selective(source="linear_combo", n_masks=2)),
    "to combination at head zero": (
        FLASH, selective(source="linear_combo", n_masks=2, combination_init="head_zero_and_bias"),
    ),
    "to latent": (FLASH, selective(source="latent", n_masks=2)),
    "from selective": (HEAD_ZERO, FLASH),
    "other switches": (HEAD_ZERO, selective(relu_leak=0.5)),
    "another penalty": (HEAD_ZERO, selective(memory_penalty=PenaltyConfig(0.1))),
} | {name: (attention, attention) for name, attention in SAME.items()}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_the_function_is_preserved_exactly_where_it_is_said_to_be(name: str, tokens: Tensor) -> None:
    kinds = PAIRS[name]
    for sizes in ({}, {"n_kv_heads": 1}):
        before = shape(kinds[0], **sizes)
        old = Decoder(before, LENGTH).double().eval()
        expected = old(tokens)
        for place in PLACES:
            for init in INITS:
                if sizes and init in ("k_zero", "ko_zero"):
                    continue
                done = operation(before, kinds[1], place, init)
                apart = (operated(old, done)(tokens) - expected).abs().max().item()
                said = preserved(done)
                assert (apart < 1e-10) == said.holds, f"{place} {init} {sizes}: {apart}, said {said}"


@pytest.mark.parametrize(
    ("kinds", "place", "kept"),
    [
        ((FLASH, FLASH), "start", {"zero", "o_zero", "ko_zero"}),
        ((FLASH, FLASH), "end", {"zero", "o_zero", "ko_zero"}),
        ((FLASH, HEAD_ZERO), "start", {"zero", "ko_zero"}),
        ((FLASH, HEAD_ZERO), "end", set()),
        ((HEAD_ZERO, HEAD_ZERO), "start", set()),
    ],
)
def test_what_the_selective_attention_log_counts_on(
    kinds: tuple[AttentionConfig, AttentionConfig], place: str, kept: set[str]
) -> None:
    found = {init for init in INITS if preserved(operation(shape(kinds[0]), kinds[1], place, init)).holds}
    assert found == kept


@pytest.mark.parametrize("attention", [FLASH, HEAD_ZERO], ids=["flash", "selective"])
@pytest.mark.parametrize("init", INITS)
def test_every_weight_of_the_new_head_moves_but_of_one_that_is_all_zero(
    attention: AttentionConfig, init: str, tokens: Tensor
) -> None:
    before = shape(bias=True)
    done = operation(before, attention, "start", init)
    model = operated(Decoder(before, LENGTH).double(), done).train()
    begun = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = make_optimizer(model, TrainingConfig(max_steps=4, lr=1e-2, weight_decay=0.0))
    for _ in range(4):
        torch.nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: value != begun[name] for name, value in model.named_parameters()}
    low, high = done.columns()
    for layer in range(before.n_layers):
        stem = f"blocks.{layer}.attention"
        parts = [moved[f"{stem}.qkv.weight"][a:b] for a, b in done.rows().values()]
        parts.append(moved[f"{stem}.out.weight"][:, low:high])
        assert len(parts) == 4
        assert all(bool(part.all() if learns(done) else not part.any()) for part in parts)


def test_the_new_head_is_drawn_as_the_model_draws_its_own() -> None:
    before = ModelConfig(d_model=128, n_layers=2, n_heads=2, vocab_size=VOCAB, bias=True)
    done = operation(before, FLASH, "end", "normal")
    torch.manual_seed(0)
    fresh = initial(Decoder(done.after, LENGTH), done)
    low, high = done.columns()
    assert (low, high) == (128, 192)
    assert fresh["blocks.0.attention.out.weight"][:, low:high].std().item() == pytest.approx(0.01, rel=0.05)
    for start, stop in done.rows().values():
        assert fresh["blocks.1.attention.qkv.weight"][start:stop].std().item() == pytest.approx(
            0.02, rel=0.05
        )
        assert not fresh["blocks.1.attention.qkv.bias"][start:stop].any()


@pytest.mark.parametrize("place", PLACES)
def test_each_init_zeroes_its_part_and_leaves_the_rest_as_drawn(place: str) -> None:
    before = shape(bias=True)

    def drawn(init: str) -> dict[str, Tensor]:
        done = operation(before, FLASH, place, init)
        torch.manual_seed(3)
        fresh = initial(Decoder(done.after, LENGTH), done)
        low, high = done.columns()
        qkv, out = (fresh[f"blocks.1.attention.{leaf}.weight"] for leaf in ("qkv", "out"))
        return {part: qkv[a:b] for part, (a, b) in done.rows().items()} | {"o": out[:, low:high]}

    normal = drawn("normal")
    assert all(bool(part.all()) for part in normal.values())
    zeroed = {"zero": "qkvo", "ko_zero": "ko", "o_zero": "o", "k_zero": "k", "o_rescaled": ""}
    for init, parts in zeroed.items():
        for part, value in drawn(init).items():
            wanted = torch.zeros_like(value) if part in parts else normal[part]
            torch.testing.assert_close(value, wanted / 5 if (init, part) == ("o_rescaled", "o") else wanted)


def test_sizes_that_grow() -> None:
    assert (grown(shape()).n_heads, grown(shape()).kv_heads(), grown(shape()).width_of_head()) == (5, 5, 4)
    explicit = grown(shape(n_kv_heads=4))
    assert (explicit.n_kv_heads, explicit.head_dim) == (5, 4)
    assert grown(shape(n_kv_heads=1)).kv_heads() == 1
    grown(shape(n_kv_heads=1)).validate()


@pytest.mark.parametrize(
    ("values", "init", "said"),
    [
        (
            {"n_kv_heads": 2},
            "normal",
            r"x has 4 query heads on 2 key/value heads: 5 query heads cannot share",
        ),
        ({"n_kv_heads": 1}, "ko_zero", r"no key of its own to zero; use o_zero or zero"),
        ({}, "kozero", r"--init 'kozero' is not known \(did you mean 'ko_zero'\?\)"),
    ],
)
def test_operations_that_cannot_be_are_refused(values: dict[str, Any], init: str, said: str) -> None:
    with pytest.raises(HeadwiseError, match=said):
        refuse(shape(**values), init, "x")


def test_the_first_parameter_of_another_shape_is_named() -> None:
    done = operation(shape(), FLASH, "start", "normal")
    weights = dict(Decoder(shape(d_ff=8), LENGTH).named_parameters())
    with pytest.raises(
        HeadwiseError, match=r"blocks\.0\.mlp\.up\.weight is \(8, 16\) there and \(64, 16\) here"
    ):
        grow(weights, initial(Decoder(done.after, LENGTH), done), done, "x")
