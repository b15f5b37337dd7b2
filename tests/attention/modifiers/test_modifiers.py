"""Modifiers: what each does, beyond what every kind keeps of them (`headwise.testing.modifiers`)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from headwise.attention import KINDS, AttentionConfig, AttentionShape, Carry
from headwise.attention.modifiers import Modifiers, window_of
from headwise.attention.observation import Scores
from headwise.config.run import Config, from_dict, load, to_yaml
from headwise.errors import HeadwiseError
from headwise.measures.collector import measure
from headwise.model.config import ModelConfig
from headwise.model.count import forward_flops_by_part
from headwise.model.decoder import Decoder
from headwise.model.generate import make_cache


def layer_of(kind: str = "mha", *, layer: int = 0, length: int | None = None, **on: Any) -> Any:
    torch.manual_seed(0)
    shape = AttentionShape(20, 4, 2, 6, layer=layer, n_layers=2, modifiers=Modifiers(**on))
    return KINDS[kind](shape, AttentionConfig(kind=kind).options()).eval()


def model_of(**on: Any) -> Decoder:
    sizes = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 23, "n_layers": 3}
    config = ModelConfig(**sizes, attention=AttentionConfig(**on))
    config.validate()
    return Decoder(config, 12).eval()


@torch.no_grad()
def test_queries_and_keys_have_the_norm_of_their_weight() -> None:
    layer = layer_of(qk_norm=True)
    q, k, v = layer.heads(torch.randn(2, 7, 20))
    plain = layer_of()
    for found in (q, k):
        torch.testing.assert_close(found.norm(dim=-1), torch.full(found.shape[:3], 6**0.5), rtol=1e-4, atol=0)
    raw = plain.heads(torch.randn(2, 7, 20))[0]
    assert raw.norm(dim=-1).std() > 0.05
    assert v.norm(dim=-1).std() > 0.05


@pytest.mark.parametrize("kind", ["mha", "flash", "flex"])
@torch.no_grad()
def test_null_weight_is_what_the_weights_lack_of_one(kind: str) -> None:
    layer = layer_of(kind, sink="learned", window=4)
    layer.modifiers.sink.logit.normal_()
    x, seen = torch.randn(2, 9, 20), []
    mask = torch.rand(2, 9, 9) < 0.7
    for given in (None, mask):
        layer.observer = seen.append
        layer(x, attn_mask=given)
        scores: Scores = seen.pop()
        q, k, _ = layer.heads(x)
        logits = layer.scale * q @ k.repeat_interleave(2, 1).mT
        near = torch.ones(9, 9).tril().triu(-3).bool()
        visible = near if given is None else near & given[:, None]
        total = logits.masked_fill(~visible, -torch.inf).exp().sum(-1)
        expected = layer.modifiers.sink.logit.exp()[:, None]
        expected = expected / (expected + total)
        torch.testing.assert_close(measure(scores)["null_weight"], expected)


@torch.no_grad()
def test_a_gate_multiplies_the_output_of_its_head() -> None:
    layer, plain, x = layer_of(output_gate="head"), layer_of(), torch.randn(2, 7, 20)
    layer.modifiers.gate.project.weight.normal_()
    given = []
    for each in (layer, plain):
        each.out.register_forward_pre_hook(lambda module, args: given.append(args[0].unflatten(-1, (4, 6))))
        each(x)
    gate = torch.sigmoid(x @ layer.modifiers.gate.project.weight.T)
    torch.testing.assert_close(given[0], given[1] * gate[..., None])


@pytest.mark.parametrize("gate", ["head", "element"])
@pytest.mark.parametrize("kind", ["flash", "selective", "tt"])
@torch.no_grad()
def test_a_model_starts_as_without_gates_whatever_its_projections_are(kind: str, gate: str) -> None:
    tokens, found = torch.randint(23, (2, 12)), []
    for chosen in ("none", gate):
        torch.manual_seed(3)
        found.append(model_of(kind=kind, output_gate=chosen)(tokens))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_values_are_mixed_with_the_first_layers() -> None:
    first, later = layer_of(value_residual=True), layer_of(layer=1, value_residual=True)
    later.modifiers.value_residual.own.fill_(0.0)
    later.modifiers.value_residual.first.fill_(1.0)
    x, carry, seen = torch.randn(2, 7, 20), Carry(), []
    attend = later.attend

    def look(x: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen.append(v)
        return attend(x, q, k, v, **options)

    later.attend = look
    first(x, carry=carry)
    later(torch.randn(2, 7, 20), carry=carry)
    assert torch.equal(seen[0], first.heads(x)[2])
    with pytest.raises(ValueError, match="run the first layer before it"):
        later(x)


def test_windows_repeat_over_the_layers_and_bound_the_cache() -> None:
    assert [window_of([8, 8, "full"], layer) for layer in range(5)] == [8, 8, None, 8, 8]
    model = model_of(windows=[4, "full"])
    assert [attention.shape.modifiers.window for attention in model.attentions()] == [4, None, 4]
    cache = make_cache(model, 1, 12)
    assert [layer.k.shape[-2] for layer in cache.layers] == [4, 12, 4]
    narrow, full = (forward_flops_by_part(m, 12)["attention_core"] for m in (model, model_of()))
    assert narrow * 9 == full * 5  # 4 + 12 + 4 keys of 3 · 12


@pytest.mark.parametrize("length", [3, 4, 9])
@torch.no_grad()
def test_a_window_as_long_as_the_sequence_is_no_window(length: int) -> None:
    x = torch.randn(1, length, 20)
    same = torch.equal(layer_of("flash", window=4)(x), layer_of("flash")(x))
    assert same == (length <= 4)


@torch.no_grad()
def test_weights_are_dropped_under_a_sink_too() -> None:
    for kind in ("mha", "flash"):
        shape = AttentionShape(20, 4, 2, 6, dropout=0.5, modifiers=Modifiers(sink="zero", window=4))
        layer = KINDS[kind](shape).train()
        x = torch.randn(1, 9, 20)
        mean = torch.stack([layer(x) for _ in range(600)]).mean(0)
        torch.testing.assert_close(mean, layer.eval()(x), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ({"sink": "learnt"}, "model.attention.sink.*learnt.*did you mean 'learned'"),
        ({"output_gate": "heads"}, "model.attention.output_gate.*did you mean 'head'"),
        ({"windows": []}, "model.attention.windows is an empty list"),
        ({"windows": [256, 0]}, "model.attention.windows has 0; .* 1 to 16777216"),
        ({"windows": ["none"]}, "model.attention.windows has 'none'; a window is 'full' or a number"),
        ({"windows": [True]}, "model.attention.windows has True"),
        ({"value_residual": True}, "model.n_layers is 1; set more layers"),
    ],
)
def test_values_that_mean_nothing_are_refused(on: dict[str, Any], said: str) -> None:
    config = ModelConfig(n_layers=1, attention=AttentionConfig(**on))
    with pytest.raises(HeadwiseError, match=said):
        config.validate()


def test_a_kind_that_cannot_take_a_modifier_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.attention.mha import VanillaAttention

    class Bare(VanillaAttention):
        supports = frozenset({"causal", "qk_norm"})
        kind = "bare"

    Bare.declines = {"sink": "its weights have no denominator"}
    monkeypatch.setitem(KINDS, "bare", Bare)
    ModelConfig(attention=AttentionConfig(kind="bare", qk_norm=True)).validate()
    said = "model.attention.sink is zero, but kind 'bare' cannot take it: its weights have no denominator"
    with pytest.raises(HeadwiseError, match=re.escape(said)):
        ModelConfig(attention=AttentionConfig(kind="bare", sink="zero")).validate()
    with pytest.raises(
        HeadwiseError, match=r"model\.attention\.windows is set, but kind 'bare' cannot take it"
    ):
        Bare(AttentionShape(20, 4, 2, 6, modifiers=Modifiers(window=4)))


@pytest.mark.parametrize(
    ("kind", "options", "modifier", "said"),
    [
        ("tropical", {}, "sink", "a maximum over keys has no denominator"),
        ("linear", {}, "windows", "sums all keys in one state"),
        ("performer", {}, "sink", "products of features"),
        ("differential", {}, "sink", "two softmaxes"),
        ("fla", {}, "output_gate", "another package's"),
        ("holo", {"form": "hrr"}, "windows", "in one vector, which none can leave"),
        ("holo", {"form": "boundary"}, "windows", "cannot take it: of the modifiers it takes none"),
    ],
)
def test_the_reason_is_that_of_the_kind(kind: str, options: Any, modifier: str, said: str) -> None:
    config = AttentionConfig(kind=kind)
    for key, value in options.items():
        setattr(config.options(), key, value)
    why = KINDS[kind].why_not(modifier, config.options())
    assert why is not None
    assert said in why
    assert why.endswith("of the modifiers it takes none")


def test_modifiers_are_keys_of_the_configuration(tmp_path: Any) -> None:
    config = from_dict(
        {"model.attention.windows": [256, "full"], "model.attention.sink": "learned", "training.max_steps": 1}
    )
    assert config.model.attention.windows == [256, "full"]
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "run.yaml") == config
    assert config.model.attention.chosen()["windows"] == [256, "full"]
    assert set(Config().model.attention.chosen()) == {"kind", "dropout"}  # profiles of today keep their names
