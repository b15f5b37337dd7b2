"""What every kind keeps of the modifiers that it declares: a pytest module, run with `contract.py`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.attention import KINDS, AttentionConfig, Carry
from headwise.attention.modifiers import MODIFIERS
from headwise.measures.collector import measure
from headwise.model.budget import within_budget
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.model.generate import make_cache, read
from headwise.model.preservation import preserved
from headwise.model.surgery import Operation, grow, grown, initial, shrink
from headwise.testing.contract import TESTED, form, seeded

__all__ = ["seeded"]  # a fixture of every test here too

LENGTH = 9
SETTINGS: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "zero sink": {"sink": "zero"},
    "learned sink": {"sink": "learned"},
    "gate by head": {"output_gate": "head"},
    "gate by element": {"output_gate": "element"},
    "value_residual": {"value_residual": True},
    "windows": {"windows": [3, "full"]},
}
STARTS_AS_WITHOUT = ("gate by head", "gate by element", "value_residual")


def together(kind: str) -> dict[str, Any]:
    """All modifiers that a kind declares, at once."""
    every: dict[str, Any] = {
        "qk_norm": True, "sink": "learned", "output_gate": "element", "value_residual": True, "windows": [3],
    }  # fmt: skip
    return {name: value for name, value in every.items() if name in KINDS[kind].supports}


def cases() -> list[Any]:
    """Each kind with each modifier that it declares, and with all of them."""
    found = []
    for kind in TESTED:
        named = {name: on for name, on in SETTINGS.items() if set(on) <= KINDS[kind].supports}
        if together(kind):
            named["all"] = together(kind)
        found += [pytest.param(kind, on, id=f"{kind}-{name}") for name, on in named.items()]
    return found


every_case = pytest.mark.parametrize(("kind", "on"), cases())
declaring = [kind for kind in TESTED if together(kind)]
every_declaring = pytest.mark.parametrize("kind", declaring)


def model_of(kind: str, on: dict[str, Any], *, random: bool = True, **sizes: Any) -> Decoder:
    """A small model in eval mode whose modifiers are away from their start where `random`."""
    own = {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 23, "init_std": 0.4}
    config = ModelConfig(**(own | sizes), attention=AttentionConfig(kind=kind, **on))
    config.validate()
    torch.manual_seed(0)
    model = Decoder(config, LENGTH).eval()
    if random:
        move_modifiers(model)
    return model


@torch.no_grad()
def move_modifiers(model: Decoder) -> None:
    for name, parameter in model.named_parameters():
        if ".modifiers." in name:
            parameter.add_(0.5 * torch.randn_like(parameter))


def tokens_of(batch: int = 2) -> Tensor:
    return torch.randint(23, (batch, LENGTH))


@every_declaring
@torch.no_grad()
def test_the_same_seed_gives_the_same_other_weights(kind: str) -> None:
    plain = dict(model_of(kind, {}, random=False).named_parameters())
    modified = dict(model_of(kind, together(kind), random=False).named_parameters())
    assert set(plain) <= set(modified)
    assert all(".modifiers." in name for name in set(modified) - set(plain))
    doubled = "output_gate" in together(kind)
    for name, value in plain.items():
        factor = 2 if doubled and name.endswith("attention.out.weight") else 1
        assert torch.equal(modified[name], factor * value), name


@every_case
@torch.no_grad()
def test_it_changes_what_is_computed_and_starts_as_it_says(kind: str, on: dict[str, Any]) -> None:
    tokens = tokens_of()
    plain = model_of(kind, {})(tokens, **form(kind))
    modified = model_of(kind, on, random=False)
    gentle = any(on == SETTINGS[name] for name in STARTS_AS_WITHOUT)
    assert torch.equal(modified(tokens, **form(kind)), plain) == gentle
    move_modifiers(modified)
    assert not torch.allclose(modified(tokens, **form(kind)), plain, atol=1e-3)


@every_case
@torch.no_grad()
def test_float32_is_close_to_float64_and_autocast_to_both(kind: str, on: dict[str, Any]) -> None:
    model, tokens = model_of(kind, on), tokens_of()
    exact = copy.deepcopy(model).double()(tokens, **form(kind))
    y = model(tokens, **form(kind))
    torch.testing.assert_close(y.double(), exact, atol=1e-4, rtol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens, **form(kind))
    assert (rounded.double() - exact).norm() < 0.05 * exact.norm()


@every_case
@torch.no_grad()
def test_step_by_step_gives_the_logits_of_the_whole_with_it(kind: str, on: dict[str, Any]) -> None:
    model = model_of(kind, on)
    if model.attentions()[0].undecodable():
        pytest.skip("it cannot go on token by token")
    tokens = tokens_of()
    whole = model(tokens)
    torch.testing.assert_close(read(model, make_cache(model, 2, LENGTH), tokens), whole, atol=1e-4, rtol=1e-3)
    if not model.attentions()[0].whole_context_only():
        with within_budget(model, 0.6):
            pruned = model(tokens)
        steps = read(model, make_cache(model, 2, LENGTH, 5), tokens)
        torch.testing.assert_close(steps, pruned, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in declaring if "windows" in KINDS[kind].supports])
@torch.no_grad()
def test_a_query_sees_no_key_outside_of_its_window(kind: str) -> None:
    layer = model_of(kind, {"windows": [3]}).attentions()[0]
    x = 3 * torch.randn(2, LENGTH, 16)
    other = x.clone()
    other[:, 2] = 9 * torch.randn(2, 16)
    before, after = layer(x, **form(kind)), layer(other, **form(kind))
    torch.testing.assert_close(after[:, 5:], before[:, 5:])
    assert not torch.allclose(after[:, 2:5], before[:, 2:5])
    wide = model_of(kind, {"windows": [LENGTH]}).attentions()[0]
    plain = model_of(kind, {}).attentions()[0]
    assert torch.equal(wide(x, **form(kind)), plain(x, **form(kind)))


@pytest.mark.parametrize("kind", [kind for kind in declaring if "cpu_training" in KINDS[kind].supports])
def test_gradients_with_all_modifiers_are_those_of_finite_differences(kind: str) -> None:
    model = model_of(kind, together(kind)).double()
    layer = model.attentions()[-1]
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    first = torch.randn(2, layer.shape.n_kv_heads, 5, layer.shape.head_dim, dtype=torch.float64)

    def run(x: Tensor, first: Tensor, *values: Tensor) -> Tensor:
        kwargs = {"carry": Carry(values=first), **form(kind)}
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,), kwargs)

    assert torch.autograd.gradcheck(run, (x, first.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("kind", [kind for kind in declaring if "cpu_training" in KINDS[kind].supports])
def test_every_parameter_of_a_modifier_learns_from_its_start(kind: str) -> None:
    model = model_of(kind, together(kind), random=False).train()
    model(tokens_of(), **form(kind)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if ".modifiers." in name:
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name


@every_declaring
@torch.no_grad()
def test_its_heads_are_measured(kind: str) -> None:
    on = together(kind)
    layer = model_of(kind, on).attentions()[0]
    seen: list[Any] = []
    layer.observer = seen.append
    x = torch.randn(2, LENGTH, 16)
    layer(x, **form(kind))
    expected = {"sink": "null_weight", "output_gate": "gate"}
    for name in (column for modifier, column in expected.items() if modifier in on):
        value = measure(seen[0])[name]
        assert value.shape == (2, layer.shape.n_heads, LENGTH)
        assert ((value > 0) & (value < 1)).all()
    assert set(seen[0].extra) <= set(measure(seen[0]))


@every_declaring
@pytest.mark.parametrize("place", ["start", "end"])
@torch.no_grad()
def test_a_head_with_modifiers_can_be_added_and_taken_out_again(kind: str, place: str) -> None:
    model = model_of(kind, together(kind))
    operation = Operation(model.config, grown(model.config), place, "o_zero")
    larger = Decoder(operation.after, LENGTH).eval()
    weights = dict(model.named_parameters())
    whole = grow(weights, initial(larger, operation), operation, "the model")
    larger.load_state_dict(whole, strict=False)
    for name, value in shrink(whole, operation).items():
        assert torch.equal(value, weights[name]), name
    if preserved(operation).holds:
        tokens = tokens_of()
        torch.testing.assert_close(larger(tokens), model(tokens), atol=1e-4, rtol=1e-3)


def test_the_suite_tests_every_modifier() -> None:
    assert {name for on in SETTINGS.values() for name in on} == set(MODIFIERS)
