"""What a layer, a document and a call are, in watched models: against eager weights, in float64."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.watch import watch
from tests.watch.test_huggingface import T5_ASKS, assert_measures, eager_weights, from_weights, seen

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def llama():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model


def own() -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(n_layers=3, n_heads=4, n_kv_heads=2, d_model=32, vocab_size=64, init_std=0.4)
    return Decoder(config, seq_len=24).eval()


def table(model, *inputs, **kwargs):
    with watch(model) as watched:
        model(*inputs, **kwargs)
    return watched.columns()


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_a_call(reentrant, tokens):
    model = llama()
    expected = table(model, tokens)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for scores in ("post_rope", "pre_rope"):
        with watch(model, scores=scores) as watched:
            for _ in range(2):
                model(tokens, labels=tokens, use_cache=False).loss.backward()
        if scores == "post_rope":
            assert_equal(watched.columns(), expected)
        assert sorted(set(watched.columns()["layer"])) == [0, 1, 2]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_of_an_own_model_is_not_a_call(reentrant, tokens):
    model = own()
    dummy = torch.ones((), requires_grad=True)
    with watch(model, per_token=True) as watched:
        y = checkpoint(lambda x, one: model(x) * one, tokens, dummy, use_reentrant=reentrant)
        y.sum().backward()
    assert watched.columns()["sample"].max() == 1
    assert len(watched.columns()["layer"]) == 2 * 3 * 4 * 24


def test_a_module_that_runs_several_times_is_one_layer_with_more_samples(hf_model, tokens):
    model = hf_model("albert")
    weights = eager_weights(model, {"input_ids": tokens})  # (B, depth, H, T, T)
    got = seen(model, {"input_ids": tokens})
    assert_measures(got, from_weights(weights.transpose(0, 1).flatten(0, 1)[:, None]))


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("lengths", [(10, 14), (1, 1, 20, 2), (23, 1)])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_measures_are_of_the_document(lengths, implementation, tokens):
    """As if every document had been a row of its own."""
    model = llama()
    model.set_attn_implementation(implementation)
    place = positions(*lengths)
    with watch(model, per_token=True) as packed:
        model(tokens[:1], position_ids=place, use_cache=False)
    with watch(model, per_token=True) as alone:
        for part in tokens[:1].split(lengths, dim=1):
            model(part, use_cache=False)
    a, b = packed.columns(), alone.columns()
    order = np.lexsort((b["token"], b["sample"], b["head"], b["layer"]))
    for name in set(a) - {"sample", "layer", "head", "token"}:
        np.testing.assert_allclose(a[name], b[name][order], rtol=2e-4, atol=2e-5, err_msg=name)


def test_a_window_of_one_key_makes_no_documents(tokens):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.MistralModel(transformers.MistralConfig(**sizes, **heads, sliding_window=1)).eval()
    length = tokens.shape[1]
    with torch.no_grad(), watch(model) as watched:
        model(tokens % 100, use_cache=False)
    columns = watched.columns()
    np.testing.assert_allclose(columns["sink_weight"], 1 / length, rtol=1e-6)  # only the first token sees it
    np.testing.assert_allclose(columns["entropy"], 0, atol=1e-6)


def test_flash_keywords_are_documents(tokens):
    """A function that isolates documents by cu_seq_lens, as flash attention does, and gets no mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def isolating(module, query, key, value, attention_mask=None, cu_seq_lens_q=None, **kwargs):
        ids = torch.searchsorted(cu_seq_lens_q, torch.arange(query.shape[2]), right=True)
        mask = (ids[:, None] == ids).tril()[None, None]
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    transformers.AttentionInterface.register("isolating", isolating)
    model, place = llama(), positions(9, 1, 14)
    expected = table(model, tokens[:1], position_ids=place, use_cache=False)
    model.set_attn_implementation("isolating")
    ends = torch.tensor([0, 9, 10, 24])
    keywords = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 14, "max_length_k": 14}
    got = table(model, tokens[:1], position_ids=place, use_cache=False, **keywords)
    assert_equal(got, expected)


def test_an_own_model_reads_a_block_diagonal_mask_as_documents():
    from headwise.attention import AttentionShape, attention_kind

    torch.manual_seed(0)
    layer = attention_kind("mha")(AttentionShape(32, 4, 2, 8)).eval()
    x = torch.randn(2, 12, 32)
    ids = torch.tensor([0] * 5 + [1] + [2] * 6)
    with watch(layer, per_token=True) as packed:
        layer(x, attn_mask=(ids[:, None] == ids)[None])
    with watch(layer, per_token=True) as alone:
        for part in x.split((5, 1, 6), dim=1):
            layer(part)
    a, b = packed.columns(), alone.columns()
    order = np.lexsort((b["token"], b["sample"] // 2, b["head"], b["sample"] % 2))
    for name in set(a) - {"sample", "layer", "head", "token"}:
        np.testing.assert_allclose(a[name], b[name][order], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_that_is_added_as_numbers_is_not_read_as_visibility(dtype, tokens):
    """An eager function adds True as 1, so nothing is hidden; an additive mask says what it does."""
    model = llama()
    model.set_attn_implementation("eager")
    visible = torch.ones(tokens.shape[1], tokens.shape[1], dtype=dtype).tril()[None, None]
    with torch.no_grad(), pytest.warns(UserWarning, match="not measured"), watch(model) as watched:
        model(tokens, attention_mask=visible)
    assert all(f"its mask is {dtype}" in reason for reason in watched.unmeasured.values())
    with pytest.raises(HeadwiseError, match="no head was measured"):
        watched.table()


@pytest.mark.parametrize("name", [pytest.param("t5", marks=T5_ASKS), "bart"])
def test_cross_attention_of_equal_lengths_is_named_and_moves_nothing(name, hf_model, tokens):
    if name == "bart":
        torch.manual_seed(0)
        sizes = {f"{part}_{key}": n for part in ("encoder", "decoder")
                 for key, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
        config = transformers.BartConfig(vocab_size=64, d_model=32, max_position_embeddings=64, **sizes)
        model = transformers.BartModel(config).eval()
    else:
        model = hf_model(name)
    padding = torch.ones_like(tokens)
    padding[1, 9:] = 0
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens, "attention_mask": padding}
    with torch.no_grad(), pytest.warns(UserWarning, match="cross-attention"), watch(model) as watched:
        model(**inputs)
    assert sorted(set(watched.columns()["layer"])) == [0, 1, 2, 3]
    assert len(watched.unmeasured) == 2
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(**inputs, output_attentions=True)
    expected = torch.cat([from_weights(w)["k_eff"].mean((0, 2)) for w in out.decoder_attentions])
    np.testing.assert_allclose(watched.columns()["k_eff"][8:], expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("build", [llama, own])
def test_a_copy_made_inside_a_watch_is_not_watched(build, tokens):
    model = build()
    with torch.no_grad(), watch(model, scores="pre_rope") as watched:
        plain = model(tokens)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
        for other in copies:
            other(tokens + 0 * tokens.flip(0))
        before = watched.columns()
        for other in copies:
            other(tokens.flip(1))
        assert_equal(watched.columns(), before)
    for other in copies:
        with torch.no_grad():
            first = lambda out: out[0] if not isinstance(out, torch.Tensor) else out  # noqa: E731
            assert torch.equal(first(other(tokens)), first(plain))


@pytest.mark.parametrize("build", [llama, own])
@pytest.mark.parametrize("way", ["wrapped", "in place", "one layer", "warm"])
def test_compiled_models_are_measured_in_full(build, way, tokens):
    model = build()
    expected = table(model, tokens)
    watched = model
    blocks = model.model.layers if build is llama else model.blocks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "in place":
            model.compile(backend="eager")
        elif way == "one layer":
            blocks[1] = torch.compile(blocks[1], backend="eager")
        else:
            watched = torch.compile(model, backend="eager")
        if way == "warm":
            watched(tokens)
        assert_equal(table(watched, tokens), expected)
        watched(tokens)
        assert_equal(table(watched, tokens), expected)


def test_two_watches_of_one_model_both_see_it(tokens):
    model = own()
    expected = table(model, tokens)
    with watch(model) as outer, watch(model) as inner:
        model(tokens)
    assert_equal(outer.columns(), expected)
    assert_equal(inner.columns(), expected)


def test_a_kind_that_declares_nothing_is_not_measured():
    from headwise.attention.base import Attention, AttentionShape

    class Uniform(Attention):
        kind = "uniform"
        supports = frozenset({"causal"})
        engine_family = "eager"

        def core(self, q, k, v, *, mask, causal):
            return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    layer = Uniform(AttentionShape(32, 4, 2, 8))
    with watch(layer) as watched:
        layer(torch.randn(1, 5, 32))
    assert watched.unmeasured == {0: "attention kind 'uniform' does not declare what its weights are"}
    with pytest.raises(HeadwiseError, match="no head was measured: attention kind 'uniform'"):
        watched.columns()


def test_windows_of_a_tower_are_segments_of_its_layers_however_many_images():
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    torch.manual_seed(0)
    sizes = {"depth": 4, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    tower = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**sizes)).eval()
    images = [[1, 4, 4], [1, 8, 4], [1, 4, 4]]
    pixels = torch.randn(64, 3 * 2 * 4 * 4)
    with torch.no_grad(), watch(tower, per_token=True) as together:
        tower(pixels, grid_thw=torch.tensor(images))
        tower(pixels[:16], grid_thw=torch.tensor(images[:1]))
    with torch.no_grad(), watch(tower, per_token=True) as alone:
        for part, image in zip(pixels.split((16, 32, 16)), images, strict=True):
            tower(part, grid_thw=torch.tensor([image]))
    a, b = together.columns(), alone.columns()
    assert sorted(set(a["layer"])) == [0, 1, 2, 3]
    assert sorted(set(a["sample"])) == [0, 1]
    order = np.lexsort((b["token"], b["sample"], b["head"], b["layer"]))
    first = a["sample"] == 0
    assert (a["token"][first] == np.tile(np.arange(64), 16)).all()
    for name in set(a) - {"sample", "layer", "head", "token"}:
        np.testing.assert_allclose(a[name][first], b[name][order], rtol=2e-4, atol=2e-5, err_msg=name)


def test_numbers_do_not_depend_on_what_ran_first(tokens):
    model = llama()
    with watch(model) as watched:
        with pytest.raises(IndexError):
            model(tokens + 64)
        model.model.layers[2].self_attn(
            torch.randn(1, 5, 64), position_embeddings=(torch.ones(1, 5, 16), torch.zeros(1, 5, 16)),
            attention_mask=None,
        )  # fmt: skip
        assert set(watched.columns()["layer"]) == {2}
        model(tokens)
    assert sorted(set(watched.columns()["layer"])) == [0, 1, 2]


def test_attention_past_the_interface_is_named_with_its_module():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=4)
    model = transformers.SiglipVisionModel(config).eval()
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="head.attention is not measured"),
        watch(model) as seen,
    ):
        model(torch.randn(1, 3, 16, 16))
    assert sorted(set(seen.columns()["layer"])) == [0, 1]
    (name,) = seen.unmeasured
    assert name.endswith("head.attention")
