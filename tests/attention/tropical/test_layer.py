"""Kind `tropical`: its options, what an observer gets, and how it runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.attention import AttentionConfig, AttentionShape
from headwise.attention.observation import Margins, Observation
from headwise.attention.tropical import TropicalAttention, TropicalConfig
from headwise.config.run import from_dict
from headwise.errors import HeadwiseError
from headwise.functional.tropical import definition
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.model.generate import make_cache, read

OPTIONS = [
    {"normalise": normalise, "gauge": gauge, "centre": centre}
    for normalise in (True, False)
    for gauge in (True, False)
    for centre in (True, False)
]


def make(**options: bool) -> TropicalAttention:
    return TropicalAttention(AttentionShape(12, 4, 2, 6), TropicalConfig(**options)).eval()


def as_written(layer: TropicalAttention, x: Tensor) -> Tensor:
    """The layer's output step by step, from the design's formulas."""
    q, k, v = layer.heads(x)
    if layer.config.normalise:
        q, k = (a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt() for a in (q, k))
    if layer.config.gauge:
        q, k, v = (a - a.amax(-1, keepdim=True) for a in (q, k, v))
    y, _ = definition(q, k, v, centre=layer.config.centre)
    y = y - y.amax(-1, keepdim=True) if layer.config.gauge else y
    out = layer.out(y.transpose(1, 2).flatten(2))
    return out - out.amax(-1, keepdim=True) if layer.config.gauge else out


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_options_do_what_the_formulas_state(options: dict[str, bool]) -> None:
    layer, x = make(**options).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), as_written(layer, x))


@torch.no_grad()
def test_under_gauge_constants_added_to_queries_keys_and_values_change_nothing() -> None:
    layer, fixed = make(normalise=False, gauge=True), make(normalise=False, gauge=False)
    q, k, v = (torch.randn(2, heads, 5, 6, dtype=torch.float64) for heads in (4, 2, 2))
    moved = [a + torch.randn(2, a.shape[1], 5, 1, dtype=torch.float64) for a in (q, k, v)]
    torch.testing.assert_close(
        layer.core(*moved, mask=None, causal=True), layer.core(q, k, v, mask=None, causal=True)
    )
    assert not torch.allclose(
        fixed.core(*moved, mask=None, causal=True), fixed.core(q, k, v, mask=None, causal=True)
    )


@torch.no_grad()
def test_normalised_queries_and_keys_forget_their_length() -> None:
    layer = make()
    q, k, v = (1 + torch.rand(2, heads, 5, 6, dtype=torch.float64) for heads in (4, 2, 2))
    y = layer.core(q, k, v, mask=None, causal=True)
    torch.testing.assert_close(layer.core(5 * q, 9 * k, v, mask=None, causal=True), y, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(make(normalise=False).core(5 * q, 9 * k, v, mask=None, causal=True), y)


@pytest.mark.parametrize(
    "options", [{"gauge": False}, {"gauge": False, "centre": False}, {"normalise": False}], ids=str
)
@torch.no_grad()
def test_step_by_step_gives_the_logits_of_the_whole(options: dict[str, bool]) -> None:
    attention = AttentionConfig(kind="tropical", tropical=TropicalConfig(**options))
    sizes: dict[str, Any] = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 23, "init_std": 0.4}
    model = Decoder(ModelConfig(**sizes, attention=attention), 9).eval()
    tokens = torch.randint(23, (2, 9))
    steps = read(model, make_cache(model, 2, 9), tokens)
    torch.testing.assert_close(steps, model(tokens), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_an_observer_gets_the_margins_of_the_pass_and_which_tokens_are_real() -> None:
    layer, x, seen = make(), torch.randn(2, 5, 12), list[Observation]()
    layer.observer = seen.append
    layer(x)
    q, k, v = layer.prepared(*layer.heads(x))
    (margins,) = seen
    assert isinstance(margins, Margins)
    torch.testing.assert_close(margins.margin, definition(q, k, v)[1])
    assert (margins.margin[:, :, 0] == math.inf).all()
    assert margins.key_mask is None
    real = torch.tensor([True, True, True, False, False])
    layer(x, attn_mask=real.expand(1, 5, 5))
    padded = seen[-1]
    assert isinstance(padded, Margins)
    assert padded.key_mask is not None
    assert padded.key_mask.tolist() == [real.tolist()] * 2
    assert layer.margin is None


@torch.no_grad()
def test_a_run_that_is_not_on_the_kernel_is_told_why() -> None:
    layer = make()
    assert layer.fallback(2, 5) is None  # has not run
    layer(torch.randn(2, 5, 12))
    assert layer.engine == "tropical-plain"
    told = layer.fallback(2, 5)
    assert told is not None
    assert told.startswith("attention runs on tropical-plain, not tropical-fused: no CUDA device.")


@pytest.mark.parametrize("kind", ["tropical", "flash"])
@pytest.mark.parametrize("switch", ["normalise", "gauge", "centre"])
def test_a_switch_is_true_or_false_whichever_kind_is_chosen(switch: str, kind: str) -> None:
    keys = {"model.attention.kind": kind, f"model.attention.tropical.{switch}": 2, "training.max_steps": 1}
    with pytest.raises((HeadwiseError, ValueError), match=switch):
        from_dict(keys).model.validate()


def test_compiled_as_one_graph_it_computes_the_same_with_gradients() -> None:
    layer, x = make(), torch.randn(2, 5, 12)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).square().sum().backward()
    gradient = layer.qkv.weight.grad
    layer.qkv.weight.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(gradient, layer.qkv.weight.grad)


def test_under_autocast_the_inner_part_is_in_float32() -> None:
    layer, x, dtypes = make(), torch.randn(2, 5, 12), []
    finished = layer.finished
    layer.out.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert dtypes == [torch.float32]
    assert y.dtype == torch.bfloat16
    assert finished(y).isfinite().all()
    y.float().square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters()
    )
