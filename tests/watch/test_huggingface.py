"""Watched Hugging Face models: right measures, untouched outputs, nothing left behind."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_utils import AttentionInterface
from transformers.models.t5 import modeling_t5

from headwise.errors import HeadwiseError
from headwise.watch import watch

NAMED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi3", "olmo2", "bert"]
ROTATED = ["llama", "llama-yarn", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "phi3", "phi3-longrope",
           "olmo2", "cohere", "modernbert"]  # fmt: skip
ODD = ["albert", "deepseek_v3", "gpt_oss", "smollm3"]
T5_ASKS = pytest.mark.skipif(
    not hasattr(modeling_t5, "ALL_ATTENTION_FUNCTIONS"), reason="T5 asks none before transformers 5.15"
)
WINDOW = 7  # of mistral and gemma2 in conftest.py
# float32 against weights that eager attention computed in float32, then entropies in float64.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def sink_of(p: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
    """The weight on each query's first key, `first (B, T)`, or on key 0."""
    if first is None:
        return p[..., 0]
    at = first.view(len(first), *[1] * (p.dim() - 3), -1, 1).expand(*p.shape[:-1], 1)
    return p.gather(-1, at)[..., 0]


def from_weights(p: torch.Tensor, first: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The measures of MEASURES that weights `(B, H, T, T)` determine, in float64."""
    p = p.double()
    position = torch.arange(p.shape[-1], dtype=torch.float64)
    descending = p.sort(dim=-1, descending=True).values.cumsum(-1)
    return {
        "entropy": torch.special.entr(p).sum(-1),
        "max_weight": p.amax(-1),
        "k_eff": (descending < 0.9 - 1e-6).sum(-1).double() + 1,
        "sink_weight": sink_of(p, first),
        "self_weight": p.diagonal(dim1=-2, dim2=-1),
        "previous_weight": torch.nn.functional.pad(p.diagonal(-1, dim1=-2, dim2=-1), (1, 0)),
        "mean_distance": (p * (position[:, None] - position).abs()).sum(-1),
    }


def from_scores(q, k, *, scale, softcap=None, window=None, causal=True) -> dict[str, torch.Tensor]:
    """Every measure of the definition, from q and k, in float64."""
    q, k = q.double(), k.double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    s = q @ k.mT * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    distance = torch.arange(s.shape[-1])[:, None] - torch.arange(s.shape[-1])
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        visible = visible & (distance.abs() < window)
    count = visible.sum(-1)
    mean = s.masked_fill(~visible, 0).sum(-1) / count
    spread = (s - mean[..., None]).square().masked_fill(~visible, 0).sum(-1) / count
    weights = s.masked_fill(~visible, -torch.inf).softmax(-1)
    logits = {"logit_mean": mean, "logit_std": spread.sqrt(), "query_norm": q.norm(dim=-1)}
    seen_alone = s.masked_fill(~visible, -torch.inf)
    logits |= {"logit_max": seen_alone.amax(-1), "log_sum_exp": seen_alone.logsumexp(-1)}
    return from_weights(weights) | logits


def seen(model, inputs, **options) -> dict[str, torch.Tensor]:
    """Per-token measures `(B, L, H, T)` by the watch."""
    with torch.no_grad(), watch(model, per_token=True, ignore_first=0, **options) as watched:
        model(**inputs)
    columns = watched.columns()
    sizes = [int(columns[key].max()) + 1 for key in ("sample", "layer", "head", "token")]
    measures = set(columns) - {"sample", "layer", "head", "token"}
    return {name: torch.from_numpy(columns[name]).view(sizes) for name in measures}


def eager_weights(model, inputs) -> torch.Tensor:
    """`(B, L, H, T, T)` from the same weights in eager mode."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    if not attentions:
        pytest.skip(f"transformers {transformers.__version__} gives no weights of {type(model).__name__}")
    return torch.stack(attentions, dim=1)


def assert_measures(got, expected, where=None):
    for name, value in expected.items():
        a, b = got[name].double(), value
        if where is not None:
            a, b = a[where], b[where]
        torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", [*NAMED, "llama-yarn", "phi3-longrope", "modernbert", "smollm3"])
def test_measures_equal_those_of_eager_weights(name, hf_model, tokens):
    inputs = {"input_ids": tokens}
    assert_measures(seen(hf_model(name), inputs), from_weights(eager_weights(hf_model(name), inputs)))


@pytest.mark.parametrize(("name", "side"), [("bert", "right"), ("llama", "left"), ("mistral", "right")])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_neither_seen_nor_measured(name, side, implementation, hf_model, tokens):
    model = copy.deepcopy(hf_model(name))
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(tokens)
    mask[1, : 9 if side == "left" else None] = 0
    if side == "right":
        mask[1] = torch.arange(tokens.shape[1]) < 15
    inputs = {"input_ids": tokens, "attention_mask": mask}
    with torch.no_grad(), watch(model, per_token=True, ignore_first=0) as watched:
        model(**inputs)
    columns = watched.columns()
    weights = eager_weights(hf_model(name), inputs)
    expected = from_weights(weights, mask.argmax(-1, keepdim=True).expand_as(mask))
    keys = tuple(torch.from_numpy(columns[key]).long() for key in ("sample", "layer", "head", "token"))
    real = [np.unique(columns["token"][columns["sample"] == b]).tolist() for b in range(2)]
    assert real == [mask[b].nonzero()[:, 0].tolist() for b in range(2)]
    for measure, value in expected.items():
        got = torch.from_numpy(columns[measure]).double()
        torch.testing.assert_close(got, value[keys], **TOLERANCE)


def test_logits_that_sdpa_leaves_unbounded_are_measured_so(hf_model, tokens, monkeypatch):
    """Transformers before 5.21 hands `softcap` to `sdpa`, which computes without it."""
    attend = AttentionInterface._global_mapping["sdpa"]

    def ignoring(*arguments, softcap=None, **options):
        return attend(*arguments, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", ignoring)
    model = copy.deepcopy(hf_model("gemma2"))
    model.config._attn_implementation = "sdpa"
    inputs = {"input_ids": tokens}
    got = seen(model, inputs)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert_measures(got, from_weights(eager_weights(model, inputs)))


@pytest.mark.parametrize("name", ROTATED)
def test_pre_rope_equals_q_and_k_taken_before_rotation(name, hf_model, tokens, monkeypatch):
    model = hf_model(name)
    source = sys.modules[type(model).__module__]
    rotate, caught = source.apply_rotary_pos_emb, []

    def catching(q, k, *args, **kwargs):
        caught.append((q, k))
        return rotate(q, k, *args, **kwargs)

    monkeypatch.setattr(source, "apply_rotary_pos_emb", catching)
    got = seen(model, {"input_ids": tokens}, scores="pre_rope")
    for layer, (q, k) in enumerate(caught):
        part = next(m for m in model.modules() if hasattr(m, "is_causal") and m.layer_idx == layer)
        window = getattr(part, "sliding_window", None) or (WINDOW if name == "mistral" else None)
        expected = from_scores(
            q, k, window=window, softcap=getattr(part, "attn_logit_softcapping", None),
            scale=getattr(part, "scaling", q.shape[-1] ** -0.5), causal=name != "modernbert",
        )  # fmt: skip
        assert_measures({n: v[:, layer] for n, v in got.items()}, expected)
    post = seen(model, {"input_ids": tokens}, measures=["query_norm", "entropy"])
    torch.testing.assert_close(post["query_norm"], got["query_norm"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(post["entropy"], got["entropy"], atol=1e-3)


@pytest.mark.parametrize("name", ["llama-yarn", "gpt_neox"])
def test_pre_rope_in_bfloat16_stays_within_its_rounding(name, hf_model, tokens):
    model = copy.deepcopy(hf_model(name)).bfloat16()
    source = sys.modules[type(model).__module__]
    rotate, caught = source.apply_rotary_pos_emb, []

    def catching(q, k, *args, **kwargs):
        caught.append((q, k))
        return rotate(q, k, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "apply_rotary_pos_emb", catching)
        got = seen(model, {"input_ids": tokens}, scores="pre_rope")
    for layer, (q, k) in enumerate(caught):
        expected = from_scores(q, k, scale=q.shape[-1] ** -0.5)
        norm = got["query_norm"][:, layer].double()
        torch.testing.assert_close(norm, expected["query_norm"], rtol=2**-7, atol=0)
        weight = got["max_weight"][:, layer].double()
        torch.testing.assert_close(weight, expected["max_weight"], rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["gpt2", "bert", "albert"])
def test_without_a_rotation_both_scores_agree(name, hf_model, tokens):
    before = seen(hf_model(name), {"input_ids": tokens}, scores="pre_rope")
    after = seen(hf_model(name), {"input_ids": tokens}, scores="post_rope")
    for measure, value in after.items():
        assert torch.equal(before[measure], value), measure


def test_layers_that_do_not_rotate_are_left_alone(hf_model, tokens):
    model = hf_model("smollm3")
    assert [bool(layer.self_attn.use_rope) for layer in model.model.layers] == [True, False]
    before = seen(model, {"input_ids": tokens}, scores="pre_rope", measures=["entropy"])["entropy"]
    after = seen(model, {"input_ids": tokens}, measures=["entropy"])["entropy"]
    assert torch.equal(before[:, 1], after[:, 1])
    assert not torch.allclose(before[:, 0], after[:, 0], atol=1e-3)


def test_pairs_that_change_places_are_put_back(hf_model, tokens):
    """DeepSeek's q is nope | rope, rotated in pairs (2d, 2d + 1) that come out in halves."""
    model = hf_model("deepseek_v3")
    projected = []
    layers = model.model.layers
    handles = [
        layer.self_attn.q_b_proj.register_forward_hook(lambda m, a, out: projected.append(out))
        for layer in layers
    ]
    got = seen(model, {"input_ids": tokens}, scores="pre_rope", measures=["query_norm"])
    for handle in handles:
        handle.remove()
    for layer, out in enumerate(projected):
        expected = out.view(2, 24, 4, 16).norm(dim=-1).transpose(1, 2)
        torch.testing.assert_close(got["query_norm"][:, layer], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted({*NAMED, *ROTATED, *ODD}))
def test_outputs_are_bit_equal(name, hf_model, tokens):
    model = hf_model(name)
    with torch.no_grad():
        plain = model(input_ids=tokens)[0]
        for scores in ("post_rope", "pre_rope"):
            with watch(model, scores=scores, measures=["query_norm", "max_weight"]):
                assert torch.equal(model(input_ids=tokens)[0], plain)
        assert torch.equal(model(input_ids=tokens)[0], plain)


def state_of(model) -> list:
    """All that a watch could leave behind."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    interface = [
        AttentionInterface.get_interface,
        AttentionInterface.__getitem__,
        set(vars(AttentionInterface)),
    ]
    return [hooks, model.config._attn_implementation, *interface]


def test_detaches_also_after_an_exception(hf_model, tokens):
    model = hf_model("llama")
    before = state_of(model)
    with watch(model, scores="pre_rope"):
        assert state_of(model) != before
    assert state_of(model) == before
    with pytest.raises(IndexError), watch(model, scores="pre_rope"):
        model(input_ids=tokens + 64)
    assert state_of(model) == before


def test_another_model_is_not_measured_and_watches_nest(hf_model, tokens):
    watched_model, other = hf_model("llama"), hf_model("qwen2")
    with torch.no_grad(), watch(watched_model, per_token=True) as outer:
        other(input_ids=tokens)
        with watch(watched_model) as inner:
            watched_model(input_ids=tokens)
        watched_model(input_ids=tokens)
    assert outer.columns()["sample"].max() == 3
    assert len(inner.columns()["layer"]) == 8


def test_means_ignore_the_first_tokens_entropy_only(hf_model, tokens):
    model = hf_model("llama")
    every = seen(model, {"input_ids": tokens})
    with torch.no_grad(), watch(model, ignore_first=2) as watched:
        for part in tokens.split(1):
            model(input_ids=part)
    columns = watched.columns()
    for name, value in every.items():
        rows = value[..., 2:] if name == "entropy" else value
        expected = rows.double().mean((0, 3)).flatten().float().numpy()
        np.testing.assert_allclose(columns[name], expected, rtol=1e-5, atol=1e-6)


def test_one_sentence_for_an_architecture_that_bypasses_the_interface(hf_model, tokens):
    with pytest.raises(HeadwiseError, match="BloomForCausalLM computes attention without"), torch.no_grad():  # noqa: SIM117
        with watch(hf_model("bloom")):
            hf_model("bloom")(input_ids=tokens)


def test_steps_with_a_cache_and_cross_attention_are_named_not_measured(hf_model, tokens):
    model = hf_model("llama")
    with pytest.warns(UserWarning, match="1 queries met 25 keys"), watch(model, per_token=True) as watched:
        model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert watched.columns()["token"].max() == 23
    assert all("25 keys" in r or "26 keys" in r for r in watched.reasons.values())


@T5_ASKS
def test_an_encoder_and_its_decoder_are_numbered_through(hf_model, tokens):
    model = hf_model("t5")
    with torch.no_grad(), pytest.warns(UserWarning, match="cross-attention"), watch(model) as watched:
        model(input_ids=tokens, decoder_input_ids=tokens[:, :10])
    assert sorted(set(watched.columns()["layer"])) == [0, 1, 2, 3]
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    with torch.no_grad():
        out = copied(input_ids=tokens, decoder_input_ids=tokens[:, :10], output_attentions=True)
    weights = [*out.encoder_attentions, *out.decoder_attentions]
    expected = torch.cat([from_weights(w)["mean_distance"].mean((0, 2)) for w in weights])
    np.testing.assert_allclose(watched.columns()["mean_distance"], expected.numpy(), rtol=1e-4)


def test_learned_sinks_take_what_null_weight_says_and_no_part_in_the_rest(hf_model, tokens):
    model = copy.deepcopy(hf_model("gpt_oss"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
        with watch(model) as watched:
            out = model(input_ids=tokens, output_attentions=True)
    weights = torch.stack(out.attentions).double()  # less than 1 in sum
    found = watched.columns()
    null = 1 - weights.sum(-1)
    assert null.mean() > 0.01
    np.testing.assert_allclose(found["null_weight"], null.mean((1, 3)).flatten(), rtol=1e-3, atol=1e-6)
    own = weights / weights.sum(-1, keepdim=True)
    np.testing.assert_allclose(found["max_weight"], own.amax(-1).mean((1, 3)).flatten(), rtol=1e-4)


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV32ForCausalLM"), reason="transformers has no indexer")
def test_layers_with_an_indexer_are_measured_over_the_keys_it_chose(hf_model, tokens):
    """Some keys are chosen by nobody, which does not make them padding."""
    model = hf_model("deepseek_v32")
    weights = eager_weights(model, {"input_ids": tokens})
    unseen = weights.sum((2, 3)) == 0
    assert unseen.any()
    assert_measures(seen(model, {"input_ids": tokens}), from_weights(weights))
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    with torch.no_grad(), watch(model, per_token=True) as watched:
        model(input_ids=tokens, attention_mask=mask)
    columns = watched.columns()
    assert set(columns["token"][columns["sample"] == 1]) == set(range(9, 24))


@pytest.mark.parametrize("added", [-1.5, 0.0])
def test_a_mask_of_one_row_is_every_querys(added, hf_model, tokens):
    model = copy.deepcopy(hf_model("bert"))
    model.set_attn_implementation("eager")
    one_row = torch.zeros(2, 1, 1, 24)
    one_row[..., 5], one_row[1, ..., 20:] = added, torch.finfo(torch.float32).min
    got = {}
    for mask in (one_row, one_row.expand(2, 1, 24, 24)):
        with torch.no_grad(), watch(model, per_token=True) as watched:
            model(input_ids=tokens, attention_mask=mask)
        got[mask.shape] = watched.columns()
    first, second = got.values()
    assert len(first["token"]) == 2 * 4 * (24 + 20)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_an_additive_mask_is_a_bias(hf_model, tokens):
    model = copy.deepcopy(hf_model("llama"))
    model.set_attn_implementation("eager")
    slope = -0.3 * (torch.arange(24)[:, None] - torch.arange(24)).abs().float()
    mask = slope.masked_fill(torch.ones(24, 24).triu(1).bool(), torch.finfo(torch.float32).min)
    inputs = {"input_ids": tokens, "attention_mask": mask.expand(2, 1, 24, 24)}
    assert_measures(seen(model, inputs), from_weights(eager_weights(hf_model("llama"), inputs)))


def test_packed_sequences_do_not_see_each_other(hf_model, tokens):
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, 24)
    inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    first = torch.tensor([0] * 10 + [10] * 14).expand(2, 24)
    weights = eager_weights(hf_model("llama"), inputs)
    assert_measures(seen(hf_model("llama"), inputs), from_weights(weights, first))


def test_a_rotation_that_cannot_be_found_is_refused(hf_model, tokens, monkeypatch):
    model = hf_model("llama")
    source = sys.modules[type(model).__module__]
    rotate = source.apply_rotary_pos_emb
    monkeypatch.setattr(
        source, "apply_rotary_pos_emb", lambda q, k, cos, sin: rotate(q.cumsum(-1), k, cos, sin)
    )
    with torch.no_grad(), pytest.raises(HeadwiseError, match="LlamaAttention could not be undone"):  # noqa: SIM117
        with watch(model, scores="pre_rope"):
            model(input_ids=tokens)
