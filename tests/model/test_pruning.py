"""Heads taken out: the smaller model is the larger one with those outputs at 0, whatever shares keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headwise.attention import AttentionConfig
from headwise.config.run import Config, load, to_yaml
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.count import forward_flops_by_part
from headwise.model.decoder import Decoder
from headwise.model.generate import make_cache, read
from headwise.model.pruning import prune, pruned, refuse, unit_size, zero
from headwise.model.surgery import refuse as refuse_surgery
from headwise.watch import watch
from headwise.watch.hooks import attention_layers
from headwise.watch.removal import removed

SHAPES = {
    "own keys": ({"n_heads": 4}, {0: [0, 2], 1: [3]}, [2, 3, 4], [2, 3, 4]),
    "own keys, given": ({"n_heads": 4, "n_kv_heads": 4, "bias": True}, {1: [0]}, [4, 3, 4], [4, 3, 4]),
    "groups": (
        {"n_heads": 6, "n_kv_heads": 3, "bias": True},
        {0: [0, 1, 4, 5], 2: [2, 3]},
        [2, 6, 4],
        [1, 3, 2],
    ),
    "one key head": ({"n_heads": 4, "n_kv_heads": 1}, {0: [1, 2], 2: [0]}, [2, 4, 3], [1, 1, 1]),
    "alike": ({"n_heads": 4}, {0: [0], 1: [1], 2: [3]}, [3, 3, 3], [3, 3, 3]),
    "alike in groups": ({"n_heads": 4, "n_kv_heads": 2}, {i: [2, 3] for i in range(3)}, [2] * 3, [1] * 3),
}


def config_of(kind: str = "mha", **sizes: object) -> ModelConfig:
    values = {"d_model": 24, "n_layers": 3, "n_heads": 4, "vocab_size": 31, "init_std": 0.3} | sizes
    config = ModelConfig(**values, attention=AttentionConfig(kind))
    if "head_dim" not in sizes:
        config.head_dim = 6
    config.validate()
    return config


def model_of(config: ModelConfig) -> Decoder:
    model = Decoder(config, 16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def built(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Decoder:
    model = Decoder(config, 16).eval()
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_the_smaller_model_computes_what_is_left(name: str) -> None:
    sizes, gone, heads, kv_heads = SHAPES[name]
    before = model_of(config_of(**sizes))
    weights = dict(before.named_parameters())
    config = pruned(before.config, gone)
    config.validate()
    after = built(config, prune(weights, before.config, gone))
    assert [a.shape.n_heads for a in after.attentions()] == heads
    assert [a.shape.n_kv_heads for a in after.attentions()] == kv_heads
    assert (config.heads_by_layer is None) == (len(set(heads)) == 1)
    tokens = torch.randint(31, (2, 9))
    layers = attention_layers(before, before, tokens)
    with removed([(layers[layer], head) for layer, some in gone.items() for head in some]):
        expected = before(tokens)
    torch.testing.assert_close(after(tokens), expected, atol=1e-4, rtol=1e-4)
    zeroed = built(before.config, zero(weights, before.config, gone))
    torch.testing.assert_close(zeroed(tokens), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        read(after, make_cache(after, 2, 9), tokens), after(tokens), atol=1e-4, rtol=1e-4
    )


ADDED = {
    "sink": ("flash", {}, {"sink": "learned", "qk_norm": True}),
    "gate of heads": ("mha", {}, {"output_gate": "head", "windows": [3, "full"]}),
    "gate of channels": ("flash", {}, {"output_gate": "element"}),
    "two queries a head": ("differential", {}, {}),
    "two halves a head": ("differential", {"version": 1}, {}),
    "distances": ("holo", {"poincare": True, "tropical_temperature": True}, {}),
    "superposition": ("holo", {"form": "hrr", "read": "reweight"}, {}),
    "maxima": ("tropical", {}, {}),
    "features": ("performer", {}, {}),
}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ADDED)
@torch.no_grad()
def test_what_kinds_and_modifiers_keep_of_a_head_leaves_with_it(name: str, kv_heads: int) -> None:
    kind, options, on = ADDED[name]
    attention = AttentionConfig(kind, **on)
    for key, value in options.items():
        setattr(attention.options(), key, value)
    sizes = {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": kv_heads, "vocab_size": 31}
    config = ModelConfig(**sizes, attention=attention)
    config.validate()
    before = Decoder(config, 16).double().eval()
    for parameter in before.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    gone = {0: [0, 1], 2: [2, 3]} if kv_heads == 2 else {0: [0], 1: [1, 3]}
    weights = {name: parameter.detach() for name, parameter in before.named_parameters()}
    refuse(config, "X")
    after = Decoder(pruned(config, gone), 16).double().eval()
    kept = prune(weights, config, gone)
    assert {n: p.shape for n, p in after.named_parameters()} == {n: p.shape for n, p in kept.items()}
    after.load_state_dict(kept, strict=False)
    before.load_state_dict(zero(weights, config, gone), strict=False)
    tokens = torch.randint(31, (2, 9))
    torch.testing.assert_close(after(tokens), before(tokens), atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_it_costs_and_holds_less_and_heads_are_measured_by_layer() -> None:
    before = model_of(config_of())
    after = Decoder(pruned(before.config, {0: [0, 1, 2], 2: [1]}), 16).eval()
    dropped = 4 * 4 * 6 * 24  # heads, matrices, width, d_model
    sizes = [sum(p.numel() for p in m.parameters()) for m in (before, after)]
    assert sizes[0] - sizes[1] == dropped
    assert after.config.least_parameters() <= sizes[1]
    flops = [forward_flops_by_part(m, 9) for m in (before, after)]
    assert flops[0]["attention_projections"] - flops[1]["attention_projections"] == 2 * dropped
    assert flops[0]["attention_core"] * 8 == flops[1]["attention_core"] * 12
    with watch(after) as seen:
        after(torch.randint(31, (2, 9)))
    assert seen.columns()["layer"].tolist() == [0, 1, 1, 1, 1, 2, 2, 2]


def test_pruning_again_counts_from_what_is_left() -> None:
    once = pruned(config_of(n_heads=6, n_kv_heads=3), {0: [0, 1]})
    twice = pruned(once, {0: [2, 3], 1: [0, 1, 2, 3]})
    assert (once.heads_by_layer, twice.heads_by_layer) == ([4, 6, 6], [2, 2, 6])
    assert [twice.heads_of(layer) for layer in range(3)] == [(2, 1), (2, 1), (6, 3)]
    thrice = pruned(twice, {2: [0, 1, 4, 5]})
    assert unit_size(once) == unit_size(twice) == 2
    assert unit_size(thrice) == 1
    assert (thrice.heads_by_layer, thrice.n_heads, thrice.n_kv_heads, thrice.head_dim) == (None, 2, 1, 6)


def test_heads_by_layer_survive_a_configuration_file(tmp_path) -> None:
    config = Config(model=pruned(config_of(), {0: [1]}))
    config.training.max_steps = 1
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "run.yaml").model.heads_by_layer == [3, 4, 4]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"heads_by_layer": [4, 4]}, "has 2 numbers for 3 layers"),
        ({"heads_by_layer": [4, 0, 4]}, r"heads_by_layer\[1\] is 0; it must be at least 1"),
        (
            {"heads_by_layer": [4, 4, 3], "n_kv_heads": 2},
            r"heads_by_layer\[2\] is 3, not a multiple of the 2",
        ),
    ],
)
def test_heads_that_no_layer_can_have_are_refused(sizes: dict, said: str) -> None:
    with pytest.raises(HeadwiseError, match=said):
        config_of(**sizes)


def test_heads_that_act_on_one_another_are_refused() -> None:
    with pytest.raises(
        HeadwiseError, match=r"X has attention kind 'selective', whose heads act on one another.*--zero"
    ):
        refuse(config_of("selective"), "X")
    with pytest.raises(
        HeadwiseError, match=r"X: no head can be added or taken out: .*kind tt are tensor trains"
    ):
        refuse(config_of("tt"), "X")
    refuse(config_of(), "X")


def test_values_of_the_first_layer_belong_to_heads_of_every_layer() -> None:
    config = config_of()
    config.attention.value_residual = True
    with pytest.raises(HeadwiseError, match=r"X has model.attention.value_residual, under which.*--zero"):
        refuse(config, "X")
    with pytest.raises(HeadwiseError, match=r"gives layers of 3, 4 key/value heads, and .*value_residual"):
        pruned(config, {0: [1]}).validate()
    refuse(replace(config, n_kv_heads=1), "X")


def test_surgery_needs_layers_alike() -> None:
    with pytest.raises(HeadwiseError, match="the layers of X have 3, 4, 4 heads"):
        refuse_surgery(pruned(config_of(), {0: [1]}), "zero", "X")
