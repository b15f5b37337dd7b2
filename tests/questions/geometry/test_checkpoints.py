"""Checkpoints of every layout: what is covered is right, and what is not is named with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headwise.cli.geometry import main
from headwise.errors import HeadwiseError
from headwise.questions.geometry.projections import read_weights
from tests.fixtures.checkpoints import build, reasons, save


def rows(projection: nn.Module) -> Tensor:
    """What a projection does to unit inputs, in float64: `(d_out, d_in)`."""
    unit = torch.eye(getattr(projection, "in_features", None) or projection.nx, dtype=torch.float64)
    projection = projection.double()
    return (projection(unit) - projection(torch.zeros_like(unit[:1]))).T


def same(found: np.ndarray, projection: nn.Module) -> None:
    np.testing.assert_allclose(found.reshape(-1, found.shape[-1]), rows(projection), rtol=1e-5, atol=1e-6)


TOWERS = [
    ("whisper", "model.encoder.layers", 4), ("whisper", "model.decoder.layers", 2),
    ("blip2", "qformer.encoder.layer", 2), ("blip2", "vision_model.encoder.layers", 2),
    ("blip2", "language_model.model.decoder.layers", 8),
    ("llava", "language_model.model.layers", 4), ("llava", "vision_tower.encoder.layers", 2),
    ("qwen2_audio", "audio_tower.layers", 4), ("qwen2_audio", "language_model.model.layers", 8),
    ("swin", "encoder.layers.0.blocks", 2), ("swin", "encoder.layers.1.blocks", 4),
    ("t5", "encoder.block", 4), ("t5", "decoder.block", 4),
    ("gemma3", "language_model.model.layers", 4), ("gemma3", "vision_tower.encoder.layers", 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "stack", "heads"), TOWERS)
def test_each_tower_has_the_heads_of_its_own_configuration(
    checkpoint, name: str, stack: str, heads: int
) -> None:
    weights = read_weights(checkpoint(name), stack=stack)
    for _, layer in weights:
        assert len(layer.q) == heads
        assert layer.o.shape[0] == heads
    others = [one for one in weights.not_covered if "another stack" in one.reason]
    assert others
    assert all(one.what.partition(".N")[0] in one.reason for one in others)


NOT_SOFTMAX = {
    "qwen3_next": ([3], "model.layers.N.linear_attn", [0, 1, 2], "linear_attention"),
    "olmo_hybrid": ([3], "model.layers.N.linear_attn", [0, 1, 2], "linear_attention"),
    "minimax": ([0, 2], "model.layers.N.self_attn", [1, 3], "linear_attention"),
    "jamba": ([1, 3], "model.layers.N", [0, 2], "none of its tensors is named as attention"),
    "nemotron_h": ([2], "backbone.layers.N", [0, 1, 3], "none of its tensors is named as attention"),
}


@pytest.mark.parametrize("name", NOT_SOFTMAX)
def test_layers_without_softmax_attention_are_named(checkpoint, name: str) -> None:
    covered, what, layers, reason = NOT_SOFTMAX[name]
    weights = read_weights(checkpoint(name))
    assert weights.layers == covered
    assert reasons(weights)[what][0] == layers
    assert reason in reasons(weights)[what][1]


@pytest.mark.parametrize(
    ("name", "reason"), [("deepseek", "multi-head latent attention"), ("diffllama", "two attention maps")]
)
def test_a_model_of_another_attention_says_which(checkpoint, name: str, reason: str) -> None:
    with pytest.raises(HeadwiseError, match=reason):
        read_weights(checkpoint(name))


def test_layers_that_share_keys_and_values_take_those_of_their_source(tmp_path: Path) -> None:
    model = build("gemma3n")
    found = dict(read_weights(save(model, tmp_path)))
    layers = model.model.layers
    assert list(found) == [0, 1, 2, 3]
    for number, source in ((0, 0), (1, 1), (2, 0), (3, 1)):
        same(found[number].q, layers[number].self_attn.q_proj)
        same(found[number].k, layers[source].self_attn.k_proj)
        same(found[number].v, layers[source].self_attn.v_proj)
    assert any("layer 2, 3 takes keys and values" in note for note in read_weights(tmp_path).notes)


def test_values_that_are_the_keys_are_shown_and_widths_may_differ_between_layers(tmp_path: Path) -> None:
    model = build("gemma4")
    weights = read_weights(save(model, tmp_path))
    found, layers = dict(weights), model.model.layers
    assert [found[n].q.shape for n in range(2)] == [(4, 8, 24), (4, 12, 24)]
    same(found[1].v, layers[1].self_attn.k_proj)
    same(found[0].v, layers[0].self_attn.v_proj)
    assert any("values are the keys" in note for note in weights.notes)


def test_values_may_be_narrower_than_queries(tmp_path: Path) -> None:
    model = build("mimo")
    layer = dict(read_weights(save(model, tmp_path)))[0]
    attention = model.model.layers[0].self_attn
    assert (layer.q.shape, layer.v.shape, layer.o.shape) == ((4, 12, 24), (2, 8, 24), (4, 24, 8))
    same(layer.v, attention.v_proj)
    same(layer.o.transpose(1, 0, 2).reshape(24, 32), attention.o_proj)


def test_values_half_as_wide_as_queries_are_no_gate(checkpoint) -> None:
    layer = dict(read_weights(checkpoint("narrow")))[0]
    assert (layer.q.shape, layer.v.shape, layer.o.shape) == ((4, 16, 24), (2, 8, 24), (4, 24, 8))


def test_layers_of_a_hybrid_that_hold_attention_are_covered(checkpoint) -> None:
    weights = read_weights(checkpoint("zamba2"))
    assert weights.layers
    assert {len(layer.q) for _, layer in weights} == {4}


@torch.no_grad()
def test_codegen_and_deberta_lay_out_their_fused_projection_in_their_own_way(tmp_path: Path) -> None:
    model = build("codegen")
    attention, seen = model.transformer.h[1].attn, []
    attention._attn = lambda q, k, v, *rest: seen.append((q, k, v)) or (v, None)
    unit = torch.eye(32)[:, None]
    for x in (torch.zeros_like(unit), unit):
        attention(x, attention_mask=None, position_ids=torch.zeros(32, 1, dtype=torch.long))
    found = dict(read_weights(save(build("codegen"), tmp_path / "codegen")))[1]
    for role, before, after in zip("qkv", *seen, strict=True):
        expected = (after - before)[:, :, 0].permute(1, 2, 0)
        np.testing.assert_allclose(getattr(found, role), expected, rtol=1e-4, atol=1e-5)

    model = build("deberta")
    attention = model.encoder.layer[2].attention.self
    found = dict(read_weights(save(model, tmp_path / "deberta")))[2]
    split = attention.transpose_for_scores(attention.in_proj(torch.eye(24))[:, None]).chunk(3, dim=-1)
    for role, expected in zip("qkv", split, strict=True):
        np.testing.assert_allclose(getattr(found, role), expected[:, :, 0].permute(1, 2, 0), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "stack", "offset"),
    [("gemma3", "language_model.model.layers", 1.0), ("gemma3", "vision_tower.encoder.layers", 0.0),
     ("qwen3_next", None, 1.0), ("gemma4", None, 0.0), ("qwen2_audio", "audio_tower.layers", 0.0),
     ("whisper", "model.encoder.layers", 0.0), ("llama", None, 0.0)],
)  # fmt: skip
def test_gains_are_what_the_norm_multiplies_by(
    checkpoint, name: str, stack: str | None, offset: float
) -> None:
    folder = checkpoint(name)
    plain, folded = read_weights(folder, stack=stack), read_weights(folder, stack=stack, fold_norm=True)
    layer = plain.layers[-1]
    norms = ("input_layernorm", "layer_norm1", "self_attn_layer_norm")
    stored = load_file(folder / "model.safetensors")
    prefix = f"{stack or 'model.layers'}.{layer}"
    gain = next(stored[key] for norm in norms if (key := f"{prefix}.{norm}.weight") in stored)
    expected = dict(plain)[layer].q * (offset + gain.numpy())
    np.testing.assert_allclose(dict(folded)[layer].q, expected, rtol=1e-6)


@settings(max_examples=8, deadline=None)
@given(kept=st.lists(st.integers(1, 6), min_size=2, max_size=2), in_memory=st.booleans())
def test_pruned_heads_keep_their_width(tmp_path_factory, kept: list[int], in_memory: bool) -> None:
    """6 heads of 16, pruned to fewer in each layer: never cut as 6 narrower ones."""
    config = transformers.BertConfig(
        hidden_size=96, num_attention_heads=6, num_hidden_layers=2, intermediate_size=8, vocab_size=8
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    expected = []
    for heads, layer in zip(kept, model.encoder.layer, strict=True):
        parts = layer.attention.self
        expected.append(parts.query.weight.detach().clone()[: 16 * heads])
        for part in (parts.query, parts.key, parts.value):
            part.weight = nn.Parameter(part.weight[: 16 * heads].clone())
            part.bias = nn.Parameter(part.bias[: 16 * heads].clone())
        out = layer.attention.output.dense
        out.weight = nn.Parameter(out.weight[:, : 16 * heads].clone())
    source: Any = model if in_memory else tmp_path_factory.mktemp("pruned")
    if not in_memory:
        save(model, source)
    for (_, layer), heads, weight in zip(read_weights(source), kept, expected, strict=True):
        assert layer.q.shape == (heads, 16, 96)
        np.testing.assert_array_equal(layer.q.reshape(-1, 96), weight)


def test_the_command_line_shows_layers_of_different_heads_and_what_is_not_covered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=8, vocab_size=8
    )
    folder = save(transformers.BertModel(config), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.startswith("encoder.layer.1.attention")]:
        if "self" in name:
            tensors[name] = tensors[name][:24].clone()
        elif name.endswith("output.dense.weight"):
            tensors[name] = tensors[name][:, :24].clone()
    tensors["encoder.layer.-1.attention.self.query.weight"] = torch.zeros(32, 32)
    tensors["encoder.layer.0.crossattention.self.query.weight"] = torch.zeros(32, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file({"x": torch.zeros(1)}, folder / "stray.safetensors")
    out, file = tmp_path / "out", tmp_path / "heads.json"
    assert main([str(folder), "--out", str(out), "--json", str(file)]) == 0
    printed, written = capsys.readouterr(), json.loads(file.read_text())
    assert "2 layers x 3 to 4 heads" in printed.out
    assert "not finite" not in printed.err
    assert "nan" not in printed.out
    assert written["heads"] == [4, 3]
    assert written["layers"] == [0, 1]
    assert len((out / "geometry.csv").read_text().splitlines()) == 1 + 2 * 7
    named = {one["what"]: one["reason"] for one in written["not_covered"]}
    assert named["stray.safetensors"] == "model.safetensors holds the model"
    assert "cross-attention" in named["encoder.layer.N.crossattention"]
    assert "below 0 does not exist" in " ".join(named.values())
    for reason in named.values():
        assert reason in printed.out
        assert reason in (out / "geometry.md").read_text()


def test_a_layer_that_does_not_exist_is_refused(checkpoint) -> None:
    weights = read_weights(checkpoint("llama"))
    for layer in (-1, 4):
        with pytest.raises(HeadwiseError, match=f"has no layer {layer}: its layers are 0, 1, 2, 3"):
            weights.read(layer)


def test_streams_of_different_width_have_a_metric_and_no_core(tmp_path: Path) -> None:
    tensors = {f"layers.0.self_attn.{n}_proj.weight": torch.randn(8, 6) for n in "qkv"}
    tensors["layers.0.self_attn.o_proj.weight"] = torch.randn(10, 8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    assert main([str(tmp_path)]) == 0
    with pytest.raises(HeadwiseError, match="reads a width of 6 and writes one of 10"):
        main([str(tmp_path), "--matrix", "core"])


def test_a_layout_that_only_the_checkpoint_knows_is_not_guessed(checkpoint, tmp_path: Path) -> None:
    """The same tensors under a model type that transformers does not know: towers keep their head counts."""
    for file in checkpoint("blip2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "unknown"}))
    for stack, heads in (("qformer.encoder.layer", 2), ("language_model.model.decoder.layers", 8)):
        weights = read_weights(tmp_path, stack=stack)
        assert [len(layer.q) for _, layer in weights] == [heads, heads]
        assert (
            "lays out its fused qkv is not known"
            in reasons(weights)["vision_model.encoder.layers.N.self_attn"][1]
        )
    with pytest.raises(
        HeadwiseError, match=r"vision_model\.encoder\.layers of .* is not covered: how model type"
    ):
        read_weights(tmp_path, stack="vision_model.encoder.layers")


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3_next"])
def test_names_without_the_prefix_of_the_whole_model_are_recognised(
    checkpoint, tmp_path: Path, name: str
) -> None:
    for file in checkpoint(name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    plain = {re.sub(r"^(model|transformer)\.", "", key): value for key, value in tensors.items()}
    save_file(plain, tmp_path / "model.safetensors", {"format": "pt"})
    for (_, found), (_, whole) in zip(read_weights(tmp_path), read_weights(checkpoint(name)), strict=True):
        for role in "qkvo":
            np.testing.assert_array_equal(getattr(found, role), getattr(whole, role))
