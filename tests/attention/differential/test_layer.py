"""Kind `differential`: both versions, what they cost, what is measured of them, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headwise.attention import AttentionConfig, AttentionShape
from headwise.attention.differential import DifferentialAttention
from headwise.attention.differential.config import DifferentialConfig
from headwise.attention.flash import FlashAttention
from headwise.attention.observation import Parts, Scores
from headwise.errors import HeadwiseError
from headwise.functional.differential import differential_attention, head_norm, negative_weight
from headwise.functional.softmax_attention import softmax_attention
from headwise.measures.collector import Collector, measure
from headwise.model.config import ModelConfig
from headwise.model.count import forward_flops_by_part, parameters_by_part
from headwise.model.decoder import Decoder
from headwise.model.rope import Rope
from headwise.testing import contract
from headwise.watch import watch

VERSIONS = pytest.mark.parametrize("version", [1, 2])
KIND = "differential"


def layer_of(version: int, **sizes: Any) -> DifferentialAttention:
    shape = AttentionShape(**({"d_model": 20, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8} | sizes))
    return DifferentialAttention(shape, DifferentialConfig(version=version)).eval()


def config_of(version: int, **sizes: Any) -> ModelConfig:
    attention = AttentionConfig(kind=KIND, differential=DifferentialConfig(version=version))
    config = ModelConfig(**({"d_model": 16, "n_heads": 2, "vocab_size": 23} | sizes), attention=attention)
    config.validate()
    return config


def tokens_of(length: int = 9) -> Tensor:
    return torch.randint(23, (2, length))


# --- version 1 keeps the contract too, which the suite checks of version 2

SHARED = [
    getattr(contract, f"test_{name}")
    for name in (
        "nothing_leaks_from_the_future", "full_attention_sees_the_future", "a_mask_matters_where_it_hides",
        "a_boolean_mask_is_an_additive_one_of_zero_and_minus_infinity", "one_mask_serves_the_whole_batch",
        "padding_before_a_text_does_not_change_it", "causality_and_a_mask_together_can_hide_every_key",
        "the_same_input_gives_the_same_output", "weights_are_dropped_in_training_only",
        "float32_is_close_to_float64", "autocast_is_close_to_float32",
        "gradients_are_those_of_finite_differences",
        "a_query_that_sees_nothing_gives_no_nan_gradients", "rotation_is_applied_to_queries_and_keys",
        "an_observer_sees_one_observation_per_forward_and_changes_nothing",
        "the_engine_that_ran_is_of_the_declared_family", "step_by_step_gives_the_logits_of_the_whole",
        "every_parameter_of_a_layer_learns",
    )
]  # fmt: skip


@pytest.fixture
def version_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's layers and models are of version 1, with heads that can be halved and rotated."""

    def make(kind: str, **sizes: Any) -> DifferentialAttention:
        return layer_of(1, **({"n_kv_heads": 4, "head_dim": 8} | sizes))

    def widths(layer: DifferentialAttention) -> tuple[int, int]:
        return layer.shape.head_dim // 2, layer.shape.head_dim

    monkeypatch.setattr(contract, "make", make)
    monkeypatch.setattr(contract, "widths", widths)
    monkeypatch.setattr(contract, "model_of", lambda kind: Decoder(config_of(1, init_std=0.4), 9).eval())


@pytest.mark.usefixtures("version_1")
@pytest.mark.parametrize("check", SHARED, ids=lambda check: check.__name__)
def test_version_1_keeps_the_contract(check: Callable[[str], None]) -> None:
    check(KIND)


@pytest.mark.usefixtures("version_1")
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_version_1_gives_zeros_where_nothing_is_seen(precision: str) -> None:
    contract.test_a_query_that_sees_nothing_gives_zeros(KIND, precision)


@pytest.mark.usefixtures("version_1")
@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize("init", ["o_zero", "ko_zero", "normal"])
def test_a_head_of_version_1_can_be_added_and_taken_out_again(place: str, init: str) -> None:
    contract.test_a_head_can_be_added_and_taken_out_again(KIND, place, init)


@pytest.mark.usefixtures("version_1")
def test_version_1_holds_a_share_of_the_context() -> None:
    contract.test_a_share_of_the_context_is_what_a_cache_of_its_size_gives(KIND, 0.6)


# --- what the layer computes


@VERSIONS
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_a_layer_computes_the_definition(version: int, kv_heads: int) -> None:
    layer = layer_of(version, n_kv_heads=kv_heads).double()
    x = 3 * torch.randn(2, 7, 20, dtype=torch.float64)
    rope = Rope(4 if version == 1 else 8)
    q, k, v = layer.heads(x)
    q, k = rope(q, k)
    if version == 1:
        a, b = ((layer.lambda_q * layer.lambda_k)[part].sum().exp() for part in (slice(4), slice(4, None)))
        lam = (a - b + 0.2).expand(1, 4, 1)
    else:
        lam = torch.sigmoid(x @ layer.lam.weight.T).transpose(1, 2)
    y = differential_attention(q, k, v, lam)
    if version == 1:
        y = head_norm(y, layer.norm, 0.8)
    torch.testing.assert_close(layer(x, rope=rope), layer.out(y.transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_version_2_with_a_lambda_of_zero_is_flash() -> None:
    layer, flash = layer_of(2), FlashAttention(AttentionShape(20, 4, 2, 8)).eval()
    x = torch.randn(2, 7, 20)
    x[..., 0] = 1
    layer.lam.weight.zero_()
    layer.lam.weight[:, 0] = -1e4
    queries, rest = layer.qkv.weight.split((64, 32))
    flash.qkv.weight.copy_(torch.cat((queries.unflatten(0, (4, 2, 8))[:, 0].flatten(0, 1), rest)))
    flash.out.weight.copy_(layer.out.weight)
    rope = Rope(8)
    torch.testing.assert_close(layer(x, rope=rope), flash(x, rope=rope))


@torch.no_grad()
def test_version_1_with_a_lambda_of_zero_is_the_norm_of_its_first_softmax() -> None:
    shape = AttentionShape(20, 4, 2, 8)
    layer = DifferentialAttention(shape, DifferentialConfig(version=1, lambda_init=0.0)).eval()
    layer.lambda_q.zero_()
    x = torch.randn(2, 7, 20)
    q, k, v = layer.heads(x)
    alone = softmax_attention(q[:, ::2], k[:, ::2], v)
    y = head_norm(alone, layer.norm, 1.0)
    torch.testing.assert_close(layer(x), layer.out(y.transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_lambda_of_version_1_starts_near_lambda_init_of_its_layer() -> None:
    for number, expected in ((0, 0.2), (3, 0.8 - 0.6 * np.exp(-0.9))):
        factor = layer_of(1, layer=number, n_layers=4).factor(torch.randn(1, 2, 20))
        assert factor.shape == (1, 4, 1)
        assert abs(factor[0, 0, 0].item() - expected) < 0.2
    fixed = DifferentialAttention(AttentionShape(20, 4, 2, 8), DifferentialConfig(version=1, lambda_init=0.5))
    assert abs(fixed.factor(torch.randn(1, 2, 20)).mean().item() - 0.5) < 0.2


def test_what_it_holds_and_costs_is_counted() -> None:
    d, h, kv, w, t = 32, 4, 2, 8, 64
    sizes = {"d_model": d, "n_heads": h, "n_kv_heads": kv, "head_dim": w, "n_layers": 1}
    plain = Decoder(ModelConfig(**sizes, vocab_size=23))
    first, second = (Decoder(config_of(version, **sizes)) for version in (1, 2))
    held = [parameters_by_part(model)["attention"] for model in (plain, first, second)]
    assert held == [held[0], held[0] + 3 * w, held[0] + (h * w + h) * d]
    assert held[0] == (h + 2 * kv) * w * d + h * w * d
    flops = [forward_flops_by_part(model, t) for model in (plain, first, second)]
    core = [found["attention_core"] for found in flops]
    # T·H·(2·2·W + 2·2·D): version 1 has W = D/2, but its queries are padded to D on a CPU
    assert core == [4 * t * h * w, 8 * t * h * w, 8 * t * h * w]
    assert (
        first.attentions()[0].flops_per_token(first.attentions()[0].shape, DifferentialConfig(version=1), t)
        == 6 * t * h * w
    )
    projections = [found["attention_projections"] for found in flops]
    assert projections == [2 * held[0], 2 * held[0], 2 * held[2]]


@VERSIONS
def test_it_compiles_whole(version: int) -> None:
    layer, x = layer_of(version), torch.randn(2, 7, 20)
    rope = Rope(4 if version == 1 else 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, rope=rope), layer(x, rope=rope))


@VERSIONS
def test_it_trains_in_bfloat16_without_nan(version: int) -> None:
    model = Decoder(config_of(version), 9)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = tokens_of()
    losses = []
    for _ in range(15):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# --- measures


@contextmanager
def seen_of(layer: DifferentialAttention, x: Tensor, **options: Any) -> Iterator[Parts]:
    seen: list[Any] = []
    layer.observer = seen.append
    layer(x, **options)
    layer.observer = None
    assert isinstance(seen[0], Parts)
    yield seen[0]


@VERSIONS
@torch.no_grad()
def test_each_part_is_measured_as_a_softmax_of_its_own(version: int) -> None:
    layer, x, rope = layer_of(version), 3 * torch.randn(2, 7, 20), Rope(4 if version == 1 else 8)
    mask = torch.ones(2, 7, 7, dtype=torch.bool)
    mask[1, :, :3] = False
    with seen_of(layer, x, rope=rope, attn_mask=mask) as seen:
        assert list(seen.parts) == ["1", "2"]
        q, k, _ = layer.heads(x)
        q, k = rope(q, k)
        for part, scores in enumerate(seen.parts.values()):
            assert isinstance(scores, Scores)
            keys = k[:, part::2] if version == 1 else k
            logits = q[:, part::2] @ keys.repeat_interleave(2, 1).transpose(-2, -1) * layer.scale
            logits = logits.masked_fill(~(mask[:, None] & torch.ones(7, 7).tril().bool()), -torch.inf)
            expected = logits.softmax(-1).amax(-1)
            found = measure(scores, measures=["max_weight", "query_norm"])
            real = mask[:, 0].expand(4, 2, 7).transpose(0, 1)
            torch.testing.assert_close(found["max_weight"][real], expected[real])
            torch.testing.assert_close(found["query_norm"], layer.heads(x)[0][:, part::2].norm(dim=-1))
        whole = measure(seen.whole)
        assert set(whole) == {"negative_weight", "lambda"}
        lam = layer.factor(x)
        below = negative_weight(q, k, lam, n_kv_heads=2, mask=mask)
        torch.testing.assert_close(whole["negative_weight"], below)
        torch.testing.assert_close(whole["lambda"], lam.expand(2, 4, 7))
        assert torch.equal(seen.whole.key_mask, mask[:, 0])
    assert layer.seen is None


@torch.no_grad()
def test_negative_weight_is_computed_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    place = "headwise.attention.differential.layer.negative_weight"
    monkeypatch.setattr(place, lambda q, *args, **kwargs: calls.append(1) or q[:, ::2, :, 0])
    layer = layer_of(2)
    with seen_of(layer, torch.randn(2, 7, 20)) as seen:
        Collector(measures=("entropy", "lambda")).add(0, seen)
        assert calls == []
        Collector(measures=("negative_weight",)).add(0, seen)
        assert calls == [1]


@VERSIONS
@torch.no_grad()
def test_the_table_has_a_row_for_each_part_and_for_the_whole(version: int) -> None:
    model = Decoder(config_of(version), 9).eval()
    tokens = tokens_of()
    with watch(model, measures=["entropy", "negative_weight", "lambda"]) as seen:
        model(tokens)
    table = seen.table()
    places = list(zip(table["layer"], table["head"], table["part"], strict=True))
    assert places == [(layer, head, part) for layer in (0, 1) for part in (None, "1", "2") for head in (0, 1)]
    whole = table["part"].is_null()
    assert table.filter(whole)["entropy"].is_nan().all()
    assert table.filter(~whole)["negative_weight"].is_nan().all()
    assert table.filter(~whole)["entropy"].is_finite().all()
    assert table.filter(whole)["lambda"].is_finite().all()
    with watch(model, measures=["entropy", "negative_weight"], per_token=True) as each:
        model(tokens)
    rows = each.table()
    assert len(rows) == 2 * 2 * 3 * 2 * 9
    later = rows.filter(rows["part"] == "2", rows["token"] >= 2).sort("layer", "head")
    means = later["entropy"].to_numpy().reshape(4, -1).mean(1)
    np.testing.assert_allclose(means, table.filter(table["part"] == "2")["entropy"], rtol=1e-5)


@torch.no_grad()
def test_padding_has_no_rows_and_is_in_no_mean() -> None:
    layer = layer_of(2)
    x, mask = torch.randn(2, 7, 20), torch.ones(2, 7, 7, dtype=torch.bool)
    mask[:, :, :3] = False
    means, rows = Collector(), Collector(per_token=True)
    with seen_of(layer, x, attn_mask=mask) as seen:
        means.add(0, seen)
        rows.add(0, seen)
    assert sorted(set(rows.columns()["token"])) == [3, 4, 5, 6]
    with seen_of(layer, x[:, 3:]) as seen:
        alone = Collector()
        alone.add(0, seen)
    for name in ("negative_weight", "lambda", "entropy"):
        np.testing.assert_allclose(means.columns()[name], alone.columns()[name], rtol=1e-4, atol=1e-6)


# --- configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "version is 3; choose 1 or 2"),
        ({"version": 1, "lambda_init": 1.0}, r"lambda_init is 1.0; it must be at least 0 and below 1"),
        ({"version": 1, "lambda_init": float("nan")}, "lambda_init is nan"),
        ({"version": 2, "lambda_init": 0.5}, "version 2 does not take it"),
    ],
)
def test_values_without_a_meaning_are_refused_whichever_kind_is_chosen(
    options: dict[str, Any], message: str
) -> None:
    for kind in (KIND, "flash"):
        attention = AttentionConfig(kind=kind, differential=DifferentialConfig(**options))
        with pytest.raises(HeadwiseError, match=message):
            ModelConfig(attention=attention).validate()


def test_heads_that_version_1_cannot_halve_or_rotate_are_refused() -> None:
    with pytest.raises(HeadwiseError, match=r"head_dim is 7, and version 1 .* two halves"):
        config_of(1, head_dim=7, position="none")
    with pytest.raises(
        HeadwiseError, match=r"head_dim is 6, of which attention kind 'differential' rotates 3"
    ):
        config_of(1, head_dim=6)
    config_of(1, head_dim=6, position="none")
    config_of(2, head_dim=6)
