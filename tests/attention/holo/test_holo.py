"""The holographic kind: its forms and switches, what they cost, and what each refuses."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.attention import KINDS, AttentionConfig, AttentionShape
from headwise.attention.holo import HoloAttention
from headwise.attention.holo.config import HoloConfig
from headwise.attention.observation import Observation, Scores, Values, Weights
from headwise.config.run import from_dict
from headwise.errors import HeadwiseError
from headwise.functional.holographic import project, reference
from headwise.model.config import ModelConfig
from headwise.model.count import forward_flops_by_part, parameters_by_part
from headwise.model.decoder import Decoder
from headwise.model.generate import make_cache, read
from headwise.model.rope import Rope

SWITCHES = ("radial_gate", "boundary_residual", "poincare", "tropical_temperature")
BOUNDARY = [dict(zip(SWITCHES, on, strict=True)) for on in itertools.product([True, False], repeat=4)]
FORMS: list[dict[str, Any]] = [*BOUNDARY, {"form": "hrr"}, {"form": "hrr", "read": "reweight"}]
some_forms = pytest.mark.parametrize(
    "options", [{}, {"poincare": True, "tropical_temperature": True}, *FORMS[-2:]], ids=str
)
SHAPE = AttentionShape(12, 4, 2, 6)


def make(shape: AttentionShape = SHAPE, **options: Any) -> HoloAttention:
    """A layer in float64 whose own parameters are far from where they start."""
    layer = HoloAttention(shape, HoloConfig(**options)).double().eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.partition(".")[0] not in ("qkv", "out"):
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return layer


def written_down(layer: HoloAttention, x: Tensor, *, causal: bool) -> Tensor:
    """The boundary form from its formulas, with every pair and every difference in memory."""
    config, tokens = layer.config, x.shape[1]
    q, k, v = layer.heads(x)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    if layer.radial is not None:
        q = q * layer.radial.sigmoid()[:, None, None]
    if config.poincare:
        c = math.exp(float(layer.log_curvature))
        u, w = project(q, c), project(k, c)
        s = -reference.poincare_distance(u[:, :, :, None], w[:, :, None], c)
    else:
        s = q @ k.transpose(-2, -1) * layer.scale
    if causal:
        s = s.masked_fill(~torch.ones(tokens, tokens).tril().bool(), -torch.inf)
    tau = torch.ones(()) if layer.log_temperature is None else layer.log_temperature.exp()[:, None, None]
    y = (tau * (s - s.amax(-1, keepdim=True))).softmax(-1) @ v
    y = layer.out(y.transpose(1, 2).flatten(2))
    return y if layer.boundary is None else y + layer.boundary(x)


@pytest.mark.parametrize(
    "options", BOUNDARY, ids=lambda o: "+".join(k for k, on in o.items() if on) or "none"
)
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_every_combination_of_switches_is_what_is_written_down(
    options: dict[str, bool], causal: bool
) -> None:
    layer, x = make(**options), torch.randn(2, 7, 12, dtype=torch.float64)
    expected = written_down(layer, x, causal=causal)
    torch.testing.assert_close(layer(x, causal=causal), expected, atol=1e-7, rtol=1e-6)
    assert layer.engine == ("holo-plain" if options["poincare"] else "holo-sdpa")
    assert (layer.fallback(2, 7) is None) != options["poincare"]


@torch.no_grad()
def test_without_switches_it_is_flash() -> None:
    layer = HoloAttention(SHAPE, HoloConfig(radial_gate=False, boundary_residual=False)).eval()
    flash = KINDS["flash"](SHAPE).eval()
    flash.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 12)
    assert torch.equal(layer(x), flash(x))


@pytest.mark.parametrize("options", FORMS, ids=str)
@torch.no_grad()
def test_decoding_gives_the_logits_of_the_whole(options: dict[str, Any]) -> None:
    attention = AttentionConfig(kind="holo", holo=HoloConfig(**options))  # type: ignore[call-arg]
    config = ModelConfig(
        d_model=16, n_heads=4, n_kv_heads=2, vocab_size=23, init_std=0.4, attention=attention
    )
    model = Decoder(config, 9).eval()
    for layer in model.attentions():
        for name, parameter in layer.named_parameters():
            if name.partition(".")[0] not in ("qkv", "out"):
                parameter.normal_(std=0.3)
    tokens = torch.randint(23, (2, 9))
    cache = make_cache(model, 2, 9)
    torch.testing.assert_close(read(model, cache, tokens), model(tokens), atol=2e-4, rtol=1e-3)
    if config.attention.options().form == "hrr":
        longer = make_cache(model, 2, 9000)
        assert longer.nbytes == cache.nbytes


@torch.no_grad()
def test_retrieval_of_one_token_is_its_value() -> None:
    layer = make(form="hrr")
    layer.qkv.weight[:24] = layer.qkv.weight[24:36].unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1)
    x = torch.randn(2, 1, 12, dtype=torch.float64)
    _, _, v = layer.heads(x)
    expected = (v / v.square().mean(-1, keepdim=True).sqrt()).repeat_interleave(2, 1)
    torch.testing.assert_close(layer(x), layer.out(expected.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_reweighting_gives_each_token_its_own_value_times_a_weight() -> None:
    layer, x, seen = make(form="hrr", read="reweight"), torch.randn(2, 7, 12, dtype=torch.float64), []
    layer.observer = seen.append
    entering: list[Tensor] = []
    layer.out.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    layer(x)
    values = layer.heads(x)[2].repeat_interleave(2, 1)
    weight = seen[0].extra["own_weight"]
    assert weight[..., 0].eq(1).all()
    assert ((weight > 0) & (weight <= 1)).all()
    torch.testing.assert_close(entering[0], (values * weight[..., None]).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("width", [32, 64, 96, 128, 256, 768])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("options", [{}, {"poincare": True, "tropical_temperature": True}, {"form": "hrr"}])
def test_parameters_are_those_of_softmax_attention(width: int, mlp: str, options: dict[str, Any]) -> None:
    def parameters(kind: str, **own: Any) -> int:
        attention = AttentionConfig(kind=kind)
        if own:
            attention = dataclasses.replace(attention, holo=HoloConfig(**own))
        config = ModelConfig(d_model=width, n_heads=4, mlp=mlp, vocab_size=64, attention=attention)
        with torch.device("meta"):
            return sum(parameters_by_part(Decoder(config, 64)).values())

    plain, ours = parameters("mha"), parameters("holo", **options)
    assert abs(ours - plain) <= 0.02 * plain
    unmatched = parameters("holo", match_parameters=False, **options)
    added = 0 if options else 2 * width**2
    assert options or unmatched == plain + added + 2 * 4  # W_b and r_h of two layers


def test_a_given_width_of_the_mlp_is_taken_as_it_is() -> None:
    config = ModelConfig(d_model=64, d_ff=200, attention=AttentionConfig(kind="holo"))
    assert config.width_of_mlp() == 200


def test_flops_are_those_of_the_matrices_and_the_core() -> None:
    def flops(**own: Any) -> dict[str, int]:
        attention = dataclasses.replace(AttentionConfig(kind="holo"), holo=HoloConfig(**own))
        config = ModelConfig(
            d_model=64, n_heads=4, n_kv_heads=2, n_layers=1, vocab_size=8, attention=attention
        )
        return forward_flops_by_part(Decoder(config, 32), 32)

    plain = flops(boundary_residual=False)
    assert plain["attention_core"] == 4 * 32 * 64
    assert flops()["attention_projections"] == plain["attention_projections"] + 2 * 64 * 64
    transform = 2.5 * 16 * 4
    expected = 2 * (2 * transform + 8 * 9) + 4 * (2 * transform + 6 * 9)
    assert flops(form="hrr")["attention_core"] == expected
    shape = AttentionShape(64, 4, 2, 16)
    hrr = HoloConfig(form="hrr")
    assert HoloAttention.flops_per_token(shape, hrr, 32) == HoloAttention.flops_per_token(shape, hrr, 4096)


@torch.no_grad()
def observed(**options: Any) -> tuple[HoloAttention, Tensor, Observation, Tensor]:
    layer, seen, entering = make(**options), [], []
    layer.observer = seen.append
    layer.out.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    layer(x, rope=Rope(6).double())
    return layer, x, seen[0], entering[0].unflatten(-1, (4, 6)).transpose(1, 2)


def test_observed_scores_are_gated() -> None:
    layer, x, seen, entering = observed(tropical_temperature=True)
    assert isinstance(seen, Scores)
    s = seen.scale * seen.q @ seen.k.repeat_interleave(2, 1).transpose(-2, -1)
    weights = s.masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(weights @ layer.heads(x)[2].repeat_interleave(2, 1), entering)


def test_observed_weights_of_distances_are_those_that_attend() -> None:
    layer, x, seen, entering = observed(poincare=True)
    assert isinstance(seen, Weights)
    torch.testing.assert_close(seen.weights @ layer.heads(x)[2].repeat_interleave(2, 1), entering)


def test_a_superposition_has_no_weights_and_shows_what_it_retrieves() -> None:
    _, _, seen, _ = observed(form="hrr")
    assert isinstance(seen, Values)
    assert set(seen.extra) == {"retrieval_cosine"}
    assert (seen.extra["retrieval_cosine"].abs() <= 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("form", "bundary", "did you mean 'boundary'"),
        ("read", "retrive", "did you mean 'retrieve'"),
        ("curvature", 0.0, "must be above 0"),
        ("curvature", float("nan"), "got NaN"),
        ("eps", 0.0, "must be at least 1e-07"),
        ("eps", 0.5, "must be at most 0.1"),
    ],
)
@pytest.mark.parametrize("kind", ["holo", "flash"])
def test_values_without_a_meaning_are_refused(key: str, value: Any, message: str, kind: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        from_dict(
            {"model.attention.kind": kind, f"model.attention.holo.{key}": value, "training.max_steps": 1}
        )


def test_a_superposition_refuses_what_needs_weights() -> None:
    layer = make(form="hrr")
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="'holo' does not support additive_mask with its options as they are"
    ):
        layer(x, attn_mask=torch.zeros(1, 4, 4))
    assert "no pair can be dropped" in str(layer.whole_context_only())
    with pytest.raises(ValueError, match="3 slots for 9 tokens"):
        layer.cache(1, 3, 9, x)
    config = {"model.attention.kind": "holo", "model.attention.holo.form": "hrr", "training.max_steps": 1}
    with pytest.raises(HeadwiseError, match="cannot drop weights"):
        from_dict(config | {"model.attention.dropout": 0.1})


@some_forms
def test_it_learns_under_autocast_without_nan(options: dict[str, Any]) -> None:
    attention = dataclasses.replace(AttentionConfig(kind="holo"), holo=HoloConfig(**options))
    config = ModelConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=8, attention=attention)
    model = Decoder(config, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(8, (8, 8)).repeat(1, 2)
    losses = []
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


@pytest.mark.parametrize("options", [FORMS[-2]], ids=str)
def test_compiled_code_computes_the_same(options: dict[str, Any]) -> None:
    layer, x = make(**options), torch.randn(2, 7, 12, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()
