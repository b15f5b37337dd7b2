from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.questions.intervene import measure as intervene
from headwise.questions.intervene.gain import fit
from headwise.questions.intervene.measure import (
    Setting,
    Target,
    all_heads,
    check_baseline,
    check_isolation,
    sweep,
)
from headwise.questions.intervene.sweep import monotonic
from headwise.watch.effect import Speaker, speaker_of
from headwise.watch.hooks import (
    ALIGNED,
    Changes,
    Layer,
    attention_layers,
    changed,
    copied_as_laid_out,
    find_layer,
    scale_head,
)
from headwise.watch.load import Loaded
from headwise.watch.observe import watch
from tests.fixtures.samples import Rows

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)
LAYER, HEAD = 1, 2


def headwise_speaker(**options: object) -> Speaker:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64, "init_std": 0.3}
    model = Decoder(ModelConfig(**(sizes | options))).eval().requires_grad_(False)  # type: ignore[arg-type]
    return Speaker(Loaded("own", model, None, model), True, True)


@pytest.fixture
def speaker(hf_model: Callable[[str], nn.Module]) -> Callable[[str], Speaker]:
    """A speaker by name, on a copy that a test may change."""
    return lambda name: (
        headwise_speaker() if name == "headwise" else speaker_of(copy.deepcopy(hf_model(name)), name)
    )


def layers_of(speaker: Speaker, rows: Rows) -> list[Layer]:
    return attention_layers(speaker.loaded.model, speaker, rows.tokens[:1])


def target_of(speaker: Speaker, rows: Rows, layer: int = LAYER, head: int = HEAD) -> Target:
    return Target(find_layer(layers_of(speaker, rows), layer, head), head)


def scale_weights(model: nn.Module, name: str, scale: float) -> None:
    """What the intervention means, done to the weights: the target head's query projection, times `scale`."""
    if name == "headwise":
        own = [model.blocks[LAYER].attention.qkv.weight]
        rows = slice(HEAD * 8, HEAD * 8 + 8)
    elif name == "gpt2":
        attention = model.transformer.h[LAYER].attn.c_attn
        own, rows = [attention.weight.T, attention.bias], slice(HEAD * 8, HEAD * 8 + 8)
    elif name == "gpt_neox":
        attention = model.gpt_neox.layers[LAYER].attention.query_key_value
        own, rows = [attention.weight, attention.bias], slice(HEAD * 24, HEAD * 24 + 8)
    elif name == "phi3":
        own, rows = [model.model.layers[LAYER].self_attn.qkv_proj.weight], slice(HEAD * 8, HEAD * 8 + 8)
    elif name == "bert":
        attention = model.encoder.layer[LAYER].attention.self.query
        own, rows = [attention.weight, attention.bias], slice(HEAD * 8, HEAD * 8 + 8)
    else:
        own, rows = [model.model.layers[LAYER].self_attn.q_proj.weight], slice(HEAD * 8, HEAD * 8 + 8)
    for tensor in own:
        tensor[rows] *= scale


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "bert", "headwise"])
def test_scaling_a_query_equals_scaling_its_projection(
    speaker: Callable[[str], Speaker], rows: Rows, name: str
) -> None:
    speaks = speaker(name)
    target = target_of(speaks, rows)
    before = speaks(rows.tokens)
    with changed(target.layer, Changes(query=scale_head(HEAD, 1.7))):
        scaled = speaks(rows.tokens)
    assert torch.equal(speaks(rows.tokens), before)
    assert not torch.equal(scaled, before)
    scale_weights(speaks.loaded.model, name, 1.7)
    torch.testing.assert_close(scaled, speaks(rows.tokens), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bert", "headwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_query_lies_in_memory_as_before(
    speaker: Callable[[str], Speaker], rows: Rows, name: str, dtype: torch.dtype
) -> None:
    """GPT-2's queries, and a headwise model's without RoPE, are slices of a fused projection."""
    speaks = headwise_speaker(position="learned", max_seq_len=20) if name == "headwise" else speaker(name)
    speaks.loaded.model.to(dtype)
    target = target_of(speaks, rows)
    seen: list[Tensor] = []
    for scale in (None, 1.0, 0.5):
        query = None if scale is None else scale_head(HEAD, scale)
        with changed(target.layer, Changes(query=query, look=lambda q, k, v: seen.append(q))):
            speaks(rows.tokens)
    plain, same, half = seen
    assert torch.equal(same, plain)
    for q in (same, half):
        assert (q.stride(), q.dtype) == (plain.stride(), plain.dtype)
        assert q.storage_offset() % ALIGNED == plain.storage_offset() % ALIGNED


def test_copies_share_no_memory_and_keep_any_layout() -> None:
    fused = torch.arange(2.0 * 5 * 24 + 3)[3:].view(2, 5, 24)
    for x in (fused, fused[..., 8:16].unflatten(-1, (2, 4)).transpose(1, 2), fused[:1, 2:, ::3]):
        copy = copied_as_laid_out(x)
        assert torch.equal(copy, x)
        assert copy.stride() == x.stride()
        assert copy.untyped_storage().data_ptr() != fused.untyped_storage().data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "headwise"])
def test_it_ends_with_the_block_also_after_an_exception(
    speaker: Callable[[str], Speaker], rows: Rows, name: str
) -> None:
    from transformers.modeling_utils import AttentionInterface

    speaks = speaker(name)
    target = target_of(speaks, rows)
    before = speaks(rows.tokens)
    methods = AttentionInterface.get_interface, AttentionInterface.__getitem__
    attributes = dict(target.layer.module.__dict__)
    with pytest.raises(ZeroDivisionError), changed(target.layer, Changes(query=lambda q: q / 0 * 1 // 0)):
        raise ZeroDivisionError
    assert torch.equal(speaks(rows.tokens), before)
    assert (AttentionInterface.get_interface, AttentionInterface.__getitem__) == methods
    assert target.layer.module.__dict__.keys() == attributes.keys()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "headwise"])
def test_changes_nest_and_apply_once_each(speaker: Callable[[str], Speaker], rows: Rows, name: str) -> None:
    speaks = speaker(name)
    layer = target_of(speaks, rows).layer
    seen: list[Tensor] = []
    with changed(layer, Changes(look=lambda q, k, v: seen.append(q))):
        speaks(rows.tokens)
    with (
        changed(layer, Changes(query=scale_head(0, 2.0), look=lambda q, k, v: seen.append(q))),
        changed(layer, Changes(query=scale_head(1, 4.0))),
    ):
        speaks(rows.tokens)
    plain, both = seen
    factors = torch.tensor([2.0, 4.0, 1.0, 1.0])[:, None, None]
    assert torch.equal(both, plain * factors)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "bert", "gemma2", "qwen3", "headwise"])
def test_checks_pass_on_a_sound_model(speaker: Callable[[str], Speaker], rows: Rows, name: str) -> None:
    speaks = speaker(name)
    target = target_of(speaks, rows)
    check_baseline(speaks, target, rows.tokens)
    check_isolation(speaks, target, rows.tokens)


def test_checks_abort_where_the_model_is_not_deterministic(
    speaker: Callable[[str], Speaker], rows: Rows
) -> None:
    speaks = speaker("gpt2")
    target = target_of(speaks, rows)
    speaks.loaded.model.train()  # GPT-2 drops 10%
    with pytest.raises(
        HeadwiseError, match=r"check failed: L1 H2 at scale 1.0 does not equal no intervention"
    ):
        check_baseline(speaks, target, rows.tokens)
    with pytest.raises(HeadwiseError, match="check failed: scaling L1 H2 also changes another head's query"):
        check_isolation(speaks, target, rows.tokens)


@torch.no_grad()
@pytest.mark.parametrize("scores", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "headwise"])
def test_the_measures_are_those_that_watch_sees(
    speaker: Callable[[str], Speaker], rows: Rows, name: str, scores: str
) -> None:
    speaks = speaker(name)
    target = target_of(speaks, rows)
    (found,) = sweep(speaks, rows, [target], Setting((0.5, 1.5), scores, batch_size=2))  # type: ignore[arg-type]
    for i, scale in enumerate((0.5, 1.5)):
        with (
            watch(speaks.loaded.model, per_token=True, scores=scores) as seen,  # type: ignore[arg-type]
            changed(target.layer, Changes(query=scale_head(HEAD, scale))),
        ):
            speaks(rows.tokens)
        columns = seen.columns()
        here = (columns["layer"] == LAYER) & (columns["head"] == HEAD) & (columns["token"] >= 2)
        assert found.n_tokens == here.sum() == 3 * 18
        for measure in ("entropy", "max_weight", "k_eff"):
            values = columns[measure][here].astype(np.float64)
            assert found.mean[measure][i] == pytest.approx(values.mean(), rel=1e-5)
            assert found.std[measure][i] == pytest.approx(values.std(ddof=1), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "headwise"])
def test_effects_are_those_on_the_next_token(
    speaker: Callable[[str], Speaker], rows: Rows, name: str
) -> None:
    speaks = speaker(name)
    (found,) = sweep(speaks, rows, [target_of(speaks, rows)], Setting(SCALES, batch_size=2))
    assert found.delta_loss is not None
    assert found.delta_loss_ci95 is not None
    assert found.kl is not None
    assert (found.delta_loss[2], found.kl[2]) == (0, 0)
    before = speaks(rows.tokens)
    scale_weights(speaks.loaded.model, name, 1.5)
    after = speaks(rows.tokens)
    losses = [
        F.cross_entropy(x[:, :-1].transpose(1, 2), rows.tokens[:, 1:], reduction="none").mean(1).double()
        for x in (before, after)
    ]
    difference = losses[1] - losses[0]
    kl = (
        F.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum")
        / rows.tokens.numel()
    )
    assert found.delta_loss[4] == pytest.approx(difference.mean().item(), rel=1e-3, abs=1e-5)
    assert found.delta_loss_ci95[4] == pytest.approx(4.302653 * difference.std().item() / 3**0.5, rel=1e-3)
    assert found.kl[4] == pytest.approx(kl.item(), rel=1e-3)
    assert all(monotonic(found).values())


@torch.no_grad()
@pytest.mark.parametrize("scores", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "headwise"])
def test_all_heads_from_one_pass_equal_running_each(
    speaker: Callable[[str], Speaker], rows: Rows, name: str, scores: str
) -> None:
    speaks = speaker(name)
    layers = layers_of(speaks, rows)
    setting = Setting((0.5, 1.0, 2.0), scores, batch_size=2)  # type: ignore[arg-type]
    found = all_heads(speaks, rows, layers, setting)
    assert [(s.layer, s.head) for s in found] == [(layer, head) for layer in range(2) for head in range(4)]
    chosen = [Target(layers[0], 3), Target(layers[1], 0)]
    for run in sweep(speaks, rows, chosen, setting):
        (same,) = (s for s in found if (s.layer, s.head) == (run.layer, run.head))
        for measure in ("entropy", "max_weight"):
            np.testing.assert_allclose(same.mean[measure], run.mean[measure], rtol=1e-5)
            np.testing.assert_allclose(same.std[measure], run.std[measure], rtol=1e-4)
        np.testing.assert_allclose(same.samples, run.samples, rtol=1e-5)
        assert same.n_tokens == run.n_tokens
        assert np.mean(fit(run.scales, run.samples).slope) == pytest.approx(
            fit(run.scales, run.mean["max_weight"]).slope
        )


@torch.no_grad()
def test_a_kind_that_selects_is_run_for_each_head(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking a kind that does not select for one that does changes the way, and must not change the gains."""
    speaks = headwise_speaker()
    layers = layers_of(speaks, rows)
    one_pass = all_heads(speaks, rows, layers, Setting((0.5, 2.0)))
    monkeypatch.setattr(intervene, "selects", lambda layer: True)
    passes: list[int] = []
    run = all_heads(speaks, rows, layers, Setting((0.5, 2.0), advance=passes.append))
    assert sum(passes) == 1 + 2 * 8
    assert [(s.layer, s.head) for s in run] == [(s.layer, s.head) for s in one_pass]
    for a, b in zip(run, one_pass, strict=True):
        np.testing.assert_allclose(a.mean["max_weight"], b.mean["max_weight"], rtol=1e-5)
        assert b.delta_loss is None
        assert a.delta_loss is not None  # the model was run


def test_an_output_that_is_not_finite_is_said(speaker: Callable[[str], Speaker], rows: Rows) -> None:
    speaks = speaker("llama")
    speaks.loaded.model.model.layers[0].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(HeadwiseError, match=r"is not finite.*NaN weights"):
        check_baseline(speaks, target_of(speaks, rows), rows.tokens)


def test_a_model_without_logits_shows_its_output_change(
    speaker: Callable[[str], Speaker], rows: Rows
) -> None:
    speaks = speaker("bert")
    (found,) = sweep(speaks, rows, [target_of(speaks, rows)], Setting((1.0, 1.5)))
    assert found.delta_loss is None
    assert found.kl is None
    assert found.output_change is not None
    assert found.output_change[0] == 0 < found.output_change[1]


def test_an_unknown_head_names_the_range(speaker: Callable[[str], Speaker], rows: Rows) -> None:
    layers = layers_of(speaker("llama"), rows)
    with pytest.raises(HeadwiseError, match="no layer 2; this model has layers 0 to 1"):
        find_layer(layers, 2, 0)
    with pytest.raises(HeadwiseError, match="layer 1 has no head 4; it has heads 0 to 3"):
        find_layer(layers, 1, 4)
    with pytest.raises(HeadwiseError, match="layer 1 has no head -1"):
        find_layer(layers, 1, -1)


def test_a_model_past_the_interface_is_refused_in_a_sentence(
    speaker: Callable[[str], Speaker], rows: Rows
) -> None:
    with pytest.raises(HeadwiseError, match="without transformers' attention interface"):
        layers_of(speaker("bloom"), rows)
    with pytest.raises(HeadwiseError, match="runs one attention module as several layers"):
        layers_of(speaker("albert"), rows)
