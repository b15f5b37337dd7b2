"""What every kind of attention keeps of all that it declares: a pytest module.

`python -m headwise.testing KIND` runs it on one kind. A new feature adds a row to `REFUSALS`. What
modifiers do is in `headwise.testing.modifiers`.
"""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise import testing
from headwise.attention import KINDS, Attention, AttentionConfig, AttentionShape, Carry
from headwise.attention.base import FEATURES
from headwise.attention.observation import (
    Observation,
)
from headwise.config.run import Config, from_dict, load, to_yaml
from headwise.errors import HeadwiseError
from headwise.functional.budget import keys_of_share
from headwise.model.budget import within_budget
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.model.generate import make_cache, read
from headwise.model.preservation import preserved
from headwise.model.rope import Rope
from headwise.model.surgery import PLACES, Operation, grow, grown, initial, refuse, shrink
from headwise.training.run import refuse_device

BATCH, LENGTH = 3, 9

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
"""Two float32 computations of one thing: the outputs below are of size 1 and differ by 3e-6 at worst."""


SHAPES: dict[str, dict[str, int]] = {
    "usual": {},
    "one token": {"length": 1},
    "even length": {"length": 4},
    "grouped": {"n_heads": 6, "n_kv_heads": 2},
    "one kv head": {"n_heads": 4, "n_kv_heads": 1},
    "13 heads": {"n_heads": 13, "n_kv_heads": 13, "head_dim": 4},
    "head_dim above d_model / n_heads": {"d_model": 10, "n_heads": 3, "n_kv_heads": 3, "head_dim": 8},
    "one head": {"n_heads": 1, "n_kv_heads": 1},
}


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Every test draws the same numbers in every session."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


def make(kind: str, **sizes: Any) -> Attention:
    """A layer in eval mode."""
    default = {"d_model": 20, "n_heads": 4, "n_kv_heads": 4, "head_dim": 6}
    return KINDS[kind](AttentionShape(**(default | sizes)), AttentionConfig(kind=kind).options()).eval()


def inputs(layer: Attention, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """`(B, T, d_model)`, wide enough that logits spread over a few units and weights are far from uniform."""
    return 3 * torch.randn(batch, length, layer.shape.d_model)


def rope_of(layer: Attention) -> Rope:
    return Rope(widths(layer)[0])


def widths(layer: Attention) -> tuple[int, int]:
    """Of one rotated query, and of all queries of a head."""
    options = AttentionConfig(kind=layer.kind).options()
    head_dim = layer.shape.head_dim
    return layer.rotated_width(head_dim, options), layer.query_width(head_dim, options)


def form(kind: str) -> dict[str, bool]:
    """The forward's `causal` in a form that the kind takes."""
    return {"causal": "causal" in KINDS[kind].supports}


def random_mask(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Half of the keys hidden, the diagonal visible so that no row is empty."""
    return (torch.rand(batch, length, length) < 0.5) | torch.eye(length, dtype=torch.bool)


def additive(mask: Tensor) -> Tensor:
    """0 where `mask` is True and -inf elsewhere."""
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


def entering_output(layer: Attention, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What the core gave, `(B, T, H·D)`, and the layer's result."""
    seen: list[Tensor] = []
    handle = layer.out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        y = layer(x, **kwargs)
    finally:
        handle.remove()
    return seen[0], y


def masks_for(kind: str) -> list[Tensor | None]:
    """No mask, and one of each form that the kind takes."""
    mask = random_mask()
    supports = KINDS[kind].supports
    found: list[Tensor | None] = [None]
    found += [mask] if "padding" in supports else []
    found += [additive(mask) + torch.randn(mask.shape)] if "additive_mask" in supports else []
    return found


ASKED = list(KINDS) if testing.kinds is None else testing.kinds
TESTED = [kind for kind in ASKED if KINDS[kind].unavailable("cpu") is None]
"""Those that compute on a CPU, where the suite runs."""
every_kind = pytest.mark.parametrize("kind", TESTED)


def kinds_with(*features: str) -> Any:
    """The kinds that declare all of `features`."""
    found = [kind for kind in TESTED if KINDS[kind].supports.issuperset(features)]
    return pytest.mark.parametrize("kind", found)


# --- what a kind says of itself


@every_kind
def test_declares_known_features_and_a_form_to_run_in(kind: str) -> None:
    supports = KINDS[kind].supports
    assert supports <= set(FEATURES)
    assert supports & {"causal", "full"}


def config_of(kind: str, **model: Any) -> Config:
    attention = AttentionConfig(
        kind=kind, dropout=model.pop("attention_dropout", 0.0), **model.pop("modifiers", {})
    )
    return Config(model=ModelConfig(attention=attention, **model))


@pytest.mark.parametrize("kind", [kind for kind in ASKED if kind not in TESTED])
def test_a_kind_that_cannot_compute_here_is_refused_with_the_reason(kind: str) -> None:
    reason = KINDS[kind].unavailable("cpu")
    assert reason is not None
    assert len(reason.splitlines()) == 1
    assert kind in reason
    with pytest.raises(HeadwiseError, match=re.escape(reason)):
        refuse_device(config_of(kind), torch.device("cpu"))


REFUSALS: dict[str, tuple[type[Exception], Callable[[str], Any]]] = {
    "causal": (ValueError, lambda kind: run_default(kind, causal=True)),
    "full": (ValueError, lambda kind: run_default(kind, causal=False)),
    "padding": (ValueError, lambda kind: run_default(kind, attn_mask=random_mask(), **form(kind))),
    "additive_mask": (
        ValueError,
        lambda kind: run_default(kind, attn_mask=additive(random_mask()), **form(kind)),
    ),
    "gqa": (HeadwiseError, lambda kind: config_of(kind, n_heads=4, n_kv_heads=2).model.validate()),
    "dropout": (HeadwiseError, lambda kind: config_of(kind, attention_dropout=0.1).model.validate()),
    "cpu_training": (HeadwiseError, lambda kind: refuse_device(config_of(kind), torch.device("cpu"))),
    "qk_norm": (HeadwiseError, lambda kind: config_of(kind, modifiers={"qk_norm": True}).model.validate()),
    "sink": (HeadwiseError, lambda kind: config_of(kind, modifiers={"sink": "zero"}).model.validate()),
    "output_gate": (
        HeadwiseError,
        lambda kind: config_of(kind, modifiers={"output_gate": "head"}).model.validate(),
    ),
    "value_residual": (
        HeadwiseError,
        lambda kind: config_of(kind, modifiers={"value_residual": True}).model.validate(),
    ),
    "windows": (HeadwiseError, lambda kind: config_of(kind, modifiers={"windows": [4]}).model.validate()),
}
"""What to ask of a kind for each feature, and how it refuses where it does not declare it."""


def run_default(kind: str, **kwargs: Any) -> Tensor:
    layer = make(kind)
    with torch.no_grad():
        return layer(inputs(layer), **kwargs)


def test_every_feature_can_be_refused() -> None:
    assert set(REFUSALS) == set(FEATURES)


@every_kind
@pytest.mark.parametrize("feature", FEATURES)
def test_takes_what_it_declares_and_refuses_the_rest(kind: str, feature: str) -> None:
    error, ask = REFUSALS[feature]
    if feature in KINDS[kind].supports:
        ask(kind)
    else:
        with pytest.raises(error, match=kind):
            ask(kind)


@every_kind
@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 0, 20), "T >= 1"), ((2, 5, 21), r"\(2, 5, 21\)"), ((5, 20), r"\(5, 20\)")],
)
def test_refuses_inputs_of_another_shape(kind: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, d_model=20)(torch.randn(shape), **form(kind))


@kinds_with("padding")
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, LENGTH, LENGTH, dtype=torch.bool), rf"\(2, {LENGTH}, {LENGTH}\)"),
        (torch.ones(BATCH, LENGTH, dtype=torch.bool), rf"\({BATCH}, {LENGTH}\)"),
        (torch.ones(1, LENGTH, LENGTH, dtype=torch.int64), "int64"),
    ],
)
def test_refuses_masks_it_would_misread(kind: str, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_default(kind, attn_mask=mask, **form(kind))


# --- shapes


@every_kind
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_output_has_the_shape_of_the_input(kind: str, name: str) -> None:
    sizes = {"length": LENGTH, "n_heads": 4, "n_kv_heads": 4} | SHAPES[name]
    if sizes["n_heads"] != sizes["n_kv_heads"] and "gqa" not in KINDS[kind].supports:
        pytest.skip("needs as many key/value heads as query heads")
    length = sizes.pop("length")
    layer = make(kind, **sizes)
    x = inputs(layer, length=length)
    y = layer(x, **form(kind))
    assert y.shape == x.shape
    assert y.isfinite().all()


# --- masks


@kinds_with("causal")
@torch.no_grad()
def test_nothing_leaks_from_the_future(kind: str) -> None:
    layer = make(kind)
    rope = rope_of(layer)
    x = inputs(layer)
    for mask in masks_for(kind):
        y = layer(x, attn_mask=mask, rope=rope)
        for j in (1, LENGTH // 2, LENGTH - 1):
            other = x.clone()
            other[:, j] = 9 * torch.randn_like(other[:, j])
            changed = layer(other, attn_mask=mask, rope=rope)
            assert torch.equal(changed[:, :j], y[:, :j])
            assert not torch.allclose(changed[:, j], y[:, j])


@kinds_with("causal", "full")
@torch.no_grad()
def test_full_attention_sees_the_future(kind: str) -> None:
    layer = make(kind)
    x = inputs(layer)
    causal, full = layer(x, causal=True), layer(x, causal=False)
    assert not torch.allclose(causal[:, 0], full[:, 0], atol=1e-3)
    torch.testing.assert_close(causal[:, -1], full[:, -1], **CLOSE)


@kinds_with("padding")
@torch.no_grad()
def test_a_mask_matters_where_it_hides(kind: str) -> None:
    layer = make(kind)
    x = inputs(layer)
    plain = layer(x, **form(kind))
    hiding = torch.ones(1, LENGTH, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(layer(x, attn_mask=hiding, **form(kind)), plain, **CLOSE)
    hiding[:, -1, 0] = False
    masked = layer(x, attn_mask=hiding, **form(kind))
    assert not torch.allclose(masked[:, -1], plain[:, -1], atol=1e-4)
    torch.testing.assert_close(masked[:, :-1], plain[:, :-1], **CLOSE)


@kinds_with("padding", "additive_mask")
@torch.no_grad()
def test_a_boolean_mask_is_an_additive_one_of_zero_and_minus_infinity(kind: str) -> None:
    layer = make(kind)
    x, mask = inputs(layer), random_mask()
    mask[0, 3] = False
    expected = layer(x, attn_mask=additive(mask), **form(kind))
    torch.testing.assert_close(layer(x, attn_mask=mask, **form(kind)), expected, **CLOSE)


@kinds_with("padding")
@torch.no_grad()
def test_one_mask_serves_the_whole_batch(kind: str) -> None:
    layer = make(kind)
    x, mask = inputs(layer), random_mask(batch=1)
    expected = layer(x, attn_mask=mask.repeat(BATCH, 1, 1), **form(kind))
    torch.testing.assert_close(layer(x, attn_mask=mask, **form(kind)), expected, **CLOSE)


@kinds_with("padding")
@torch.no_grad()
def test_padding_before_a_text_does_not_change_it(kind: str) -> None:
    layer, pad = make(kind), 3
    relative = KINDS[kind].shift_invariant(AttentionConfig(kind=kind).options())
    rope = rope_of(layer) if relative else None
    x = inputs(layer)
    real = torch.arange(LENGTH) >= pad
    y = layer(x, attn_mask=real.expand(1, LENGTH, LENGTH), rope=rope, **form(kind))
    alone = layer(x[:, pad:], rope=rope, **form(kind))
    torch.testing.assert_close(y[:, pad:], alone, **CLOSE)


@kinds_with("padding")
@pytest.mark.parametrize("precision", ["float32", "autocast"])
@torch.no_grad()
def test_a_query_that_sees_nothing_gives_zeros(kind: str, precision: str) -> None:
    layer = make(kind)
    x, mask = inputs(layer), random_mask()
    mask[1, 4] = False
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        core, y = entering_output(layer, x, attn_mask=mask, **form(kind))
    assert y.isfinite().all()
    assert (core[1, 4] == 0).all()
    assert (core[1, 5] != 0).any()
    assert (core[0, 4] != 0).any()


@kinds_with("additive_mask", "causal")
@torch.no_grad()
def test_causality_and_a_mask_together_can_hide_every_key(kind: str) -> None:
    layer = make(kind)
    mask = torch.zeros(1, LENGTH, LENGTH)
    mask[:, 2, :3] = -torch.inf
    core, _ = entering_output(layer, inputs(layer), attn_mask=mask)
    assert (core[:, 2] == 0).all()
    assert (core[:, 3] != 0).any()


# --- numbers


@every_kind
@torch.no_grad()
def test_the_same_input_gives_the_same_output(kind: str) -> None:
    layer = make(kind)
    x = inputs(layer)
    for mask in masks_for(kind):
        first = layer(x, attn_mask=mask, **form(kind))
        assert torch.equal(layer(x, attn_mask=mask, **form(kind)), first)


@kinds_with("dropout")
@torch.no_grad()
def test_weights_are_dropped_in_training_only(kind: str) -> None:
    layer = make(kind, dropout=0.5)
    undropped = make(kind)
    undropped.load_state_dict(layer.state_dict())
    x = inputs(layer)
    y = layer(x, **form(kind))
    assert torch.equal(y, undropped(x, **form(kind)))
    layer.train()
    first, second = layer(x, **form(kind)), layer(x, **form(kind))
    assert not torch.allclose(first, y, atol=1e-3)
    assert not torch.allclose(first, second, atol=1e-3)


@every_kind
@torch.no_grad()
def test_float32_is_close_to_float64(kind: str) -> None:
    layer = make(kind)
    rope = rope_of(layer)
    double = copy.deepcopy(layer).double()
    x = inputs(layer)
    for mask in masks_for(kind):
        exact = double(x.double(), attn_mask=mask, rope=rope, **form(kind))
        assert exact.dtype == torch.float64
        y = layer(x, attn_mask=mask, rope=rope, **form(kind))
        torch.testing.assert_close(y.double(), exact, **CLOSE)


@every_kind
@torch.no_grad()
def test_autocast_is_close_to_float32(kind: str) -> None:
    layer = make(kind)
    rope = rope_of(layer)
    x = inputs(layer)
    for mask in masks_for(kind):
        exact = layer(x, attn_mask=mask, rope=rope, **form(kind))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, attn_mask=mask, rope=rope, **form(kind))
        assert y.isfinite().all()
        assert (y.float() - exact).norm() < 0.03 * exact.norm()


@kinds_with("cpu_training")
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    layer = make(kind, d_model=5, n_heads=2, n_kv_heads=2, head_dim=4, bias=True).double()
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    masks = [mask if mask is None else mask[:2, :4, :4] for mask in masks_for(kind)]
    for mask in masks:

        def run(x: Tensor, *values: Tensor, mask: Tensor | None = mask) -> Tensor:
            kwargs = {"attn_mask": mask, **form(kind)}
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,), kwargs)

        assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@kinds_with("cpu_training", "padding")
def test_a_query_that_sees_nothing_gives_no_nan_gradients(kind: str) -> None:
    layer = make(kind)
    x, mask = inputs(layer).requires_grad_(), random_mask()
    mask[:, 0] = False
    layer(x, attn_mask=mask, **form(kind)).square().sum().backward()
    assert x.grad is not None
    for gradient in (x.grad, *(parameter.grad for parameter in layer.parameters())):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert (gradient != 0).any()


# --- rotation


@every_kind
@torch.no_grad()
def test_rotation_is_applied_to_queries_and_keys(kind: str) -> None:
    layer = make(kind)
    x, seen = inputs(layer), []

    def identity(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((q.shape, k.shape))
        return q, k

    plain = layer(x, **form(kind))
    assert torch.equal(layer(x, rope=identity, **form(kind)), plain)
    width, queries = widths(layer)
    numbers = (4 * queries // width, 4 * layer.shape.head_dim // width)
    assert seen == [tuple(torch.Size((BATCH, heads, LENGTH, width)) for heads in numbers)]
    rotated = layer(x, rope=rope_of(layer), **form(kind))
    assert not torch.allclose(rotated[:, -1], plain[:, -1], atol=1e-4)


# --- observation


@every_kind
@torch.no_grad()
def test_an_observer_sees_one_observation_per_forward_and_changes_nothing(kind: str) -> None:
    layer = make(kind)
    rope = rope_of(layer)
    x = inputs(layer)
    for mask in masks_for(kind):
        kwargs = {"attn_mask": mask, "rope": rope, **form(kind)}
        seen: list[Observation] = []
        y = layer(x, **kwargs)
        layer.observer = seen.append
        assert torch.equal(layer(x, **kwargs), y)
        assert len(seen) == 1
        assert isinstance(seen[0], Observation)
        layer.observer = None
        layer(x, **kwargs)
        assert len(seen) == 1


@every_kind
@torch.no_grad()
def test_the_engine_that_ran_is_of_the_declared_family(kind: str) -> None:
    layer = make(kind)
    assert layer.engine is None
    layer(inputs(layer), **form(kind))
    assert layer.engine is not None
    assert layer.engine.partition("-")[0] == KINDS[kind].engine_family


@kinds_with("cpu_training")
def test_head_dropout_drops_whole_heads_in_training_alone(kind: str) -> None:
    plain, dropping = make(kind, bias=True), make(kind, bias=True, head_dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    x = inputs(plain, batch=16)
    with torch.no_grad():
        whole, expected = entering_output(plain, x, **form(kind))
        assert torch.equal(dropping(x, **form(kind)), expected)
        found, _ = entering_output(dropping.train(), x, **form(kind))
    whole, found = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (whole, found))  # (B, H, T, D)
    dropped = (found == 0).all(-1).all(-1)
    assert 0 < dropped.sum() < dropped.numel()
    kept = ~dropped[:, :, None, None]
    torch.testing.assert_close(found, 2 * whole * kept, **CLOSE)


# --- in a model


def model_of(kind: str, **sizes: Any) -> Decoder:
    """A small model in eval mode whose attention is far from uniform."""
    config = ModelConfig(
        **({"d_model": 16, "n_heads": 2, "vocab_size": 23, "init_std": 0.4} | sizes),
        attention=AttentionConfig(kind=kind),
    )
    config.validate()
    return Decoder(config, LENGTH).eval()


@every_kind
def test_options_survive_a_configuration_file(kind: str, tmp_path: Path) -> None:
    keys = {"model.attention.kind": kind, "training.max_steps": 1}
    config = from_dict(keys)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "run.yaml") == config
    options = config.model.attention.options()
    assert (options is None) == (KINDS[kind].options is None)


@every_kind
@torch.no_grad()
def test_step_by_step_gives_the_logits_of_the_whole(kind: str) -> None:
    model = model_of(kind)
    tokens = torch.randint(23, (2, LENGTH))
    if reason := model.attentions()[0].undecodable():
        assert len(reason) > 10
        with pytest.raises(HeadwiseError, match=re.escape(reason)):
            make_cache(model, 2, LENGTH)
        return
    whole, steps = model(tokens), read(model, make_cache(model, 2, LENGTH), tokens)
    torch.testing.assert_close(steps, whole, atol=1e-4, rtol=1e-3)


@every_kind
@pytest.mark.parametrize("share", [1 / 3, 0.6])
@torch.no_grad()
def test_a_share_of_the_context_is_what_a_cache_of_its_size_gives(kind: str, share: float) -> None:
    model = model_of(kind)
    layer = model.attentions()[0]
    tokens = torch.randint(23, (2, LENGTH))
    if layer.whole_context_only():
        with pytest.raises(HeadwiseError, match="cannot hold a share"), within_budget(model, share):
            pass
        return
    with within_budget(model, share):
        pruned = model(tokens)
    if layer.undecodable() is None:
        slots = keys_of_share(share, LENGTH, layer.keeps_first)
        steps = read(model, make_cache(model, 2, LENGTH, slots), tokens)
        torch.testing.assert_close(steps, pruned, atol=1e-4, rtol=1e-3)
    assert torch.equal(model(tokens), model(tokens))  # nothing of the budget stays behind


@every_kind
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("init", ["zero", "o_zero", "ko_zero", "normal"])
@torch.no_grad()
def test_a_head_can_be_added_and_taken_out_again(kind: str, place: str, init: str) -> None:
    model = model_of(kind)
    if KINDS[kind].heads_are_fixed(model.config.attention.options()):
        with pytest.raises(HeadwiseError, match="no head can be added"):
            refuse(model.config, init, "the model")
        return
    operation = Operation(model.config, grown(model.config), place, init)
    larger = Decoder(operation.after, LENGTH).eval()
    weights = dict(model.named_parameters())
    whole = grow(weights, initial(larger, operation), operation, "the model")
    larger.load_state_dict(whole, strict=False)
    for name, value in shrink(whole, operation).items():
        assert torch.equal(value, weights[name]), name
    if preserved(operation).holds:
        tokens = torch.randint(23, (2, LENGTH))
        torch.testing.assert_close(larger(tokens), model(tokens), atol=1e-4, rtol=1e-3)


@kinds_with("cpu_training", "causal")
def test_every_parameter_of_a_layer_learns(kind: str) -> None:
    model = model_of(kind).train()
    tokens = torch.randint(23, (2, LENGTH))
    carry = Carry()
    (model(tokens, carry=carry).square().mean() + carry.penalty).backward()
    for name, parameter in model.attentions()[0].named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
