"""Sinks and windows: PyTorch's kernels by way of their log-sum-exp, against the definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.functional.fused_attention import fused_attention, null_key_attention, takes
from headwise.functional.softmax_attention import additive_mask, softmax_attention, windowed

WAYS = (fused_attention, null_key_attention)
CLOSE = {"atol": 1e-11, "rtol": 1e-9}


def inputs(tokens: int, *, heads: int = 4, kv_heads: int = 4, width: int = 8) -> list[Tensor]:
    """q, k, v and a sink a head, leaves of a graph in float64."""
    shapes = [(2, heads, tokens, width), (2, kv_heads, tokens, width), (2, kv_heads, tokens, width), (heads,)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_the_definition_is_a_softmax_with_one_more_logit_whose_value_is_zero() -> None:
    q, k, v, sink = inputs(7)
    y = softmax_attention(q, k, v, causal=False, scale=0.5, sink=sink)
    weights = (0.5 * q @ k.mT).exp()
    total = weights.sum(-1, keepdim=True) + sink.exp()[:, None, None]
    torch.testing.assert_close(y, weights / total @ v, **CLOSE)


def test_the_definition_within_a_window_sees_the_last_keys() -> None:
    q, k, v, _ = inputs(7)
    y = softmax_attention(q, k, v, window=3)
    torch.testing.assert_close(
        y[:, :, 6:], softmax_attention(q[:, :, 6:], k[:, :, 4:], v[:, :, 4:], causal=False)
    )
    both = softmax_attention(q, k, v, causal=False, window=2)
    torch.testing.assert_close(
        both[:, :, 3:4], softmax_attention(q[:, :, 3:4], k[:, :, 2:5], v[:, :, 2:5], causal=False)
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [1, 2, 33, 64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_sink_on_any_kernel_is_the_definition(
    way: Callable[..., Tensor], tokens: int, causal: bool, kv_heads: int
) -> None:
    leaves = inputs(tokens, kv_heads=kv_heads)
    q, k, v, sink = leaves
    for masked in (False, True):
        bias = mask = None
        if masked:
            mask = torch.randn(2, tokens, tokens, dtype=torch.float64).masked_fill(
                (torch.rand(2, tokens, tokens) < 0.3) & ~torch.eye(tokens, dtype=torch.bool), -torch.inf
            )
            bias, _ = additive_mask(mask, causal=causal, length=tokens, like=q)
        expected = softmax_attention(q, k, v, causal=causal, mask=mask, scale=0.4, sink=sink)
        y = way(q, k, v, causal=causal and bias is None, scale=0.4, bias=bias, sink=sink)
        torch.testing.assert_close(y, expected, **CLOSE)
        upstream = torch.randn_like(y)
        found = torch.autograd.grad(y, leaves, upstream)
        for ours, true in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
            torch.testing.assert_close(ours, true, **CLOSE)


def test_gradients_are_those_of_finite_differences() -> None:
    leaves = inputs(5, kv_heads=2)
    assert torch.autograd.gradcheck(
        lambda q, k, v, sink: fused_attention(q, k, v, causal=True, scale=0.5, sink=sink), leaves
    )


@given(st.floats(-1e4, 1e4))
def test_sinks_of_any_size_give_numbers_and_the_limits_are_right(sink: float) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    c = torch.full((2,), sink, requires_grad=True)
    y = fused_attention(q, k, v, causal=True, scale=0.3, sink=c)
    y.sum().backward()
    assert y.isfinite().all()
    assert c.grad is not None
    assert c.grad.isfinite().all()
    if sink > 200:
        assert (y == 0).all()
    if sink < -200:
        torch.testing.assert_close(y, softmax_attention(q, k, v, scale=0.3))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "repeated gradient"])
def test_tensors_may_lie_in_memory_in_any_way(layout: str) -> None:
    q, k, v, sink = (leaf.detach() for leaf in inputs(9))
    if layout == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "sliced":
        q, k, v = torch.cat((q, k, v), dim=-1).split(8, dim=-1)
    elif layout == "expanded":
        k = k[:, :1].expand(-1, 4, -1, -1)
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
    y = fused_attention(q, k, v, causal=True, scale=0.4, sink=sink)
    expected = softmax_attention(q, k, v, scale=0.4, sink=sink)
    for one in (y, expected):
        upstream = (
            torch.ones((), dtype=one.dtype).expand_as(one) if layout == "repeated gradient" else one.cos()
        )
        one.backward(upstream, retain_graph=True)
        gradients = [x.grad.clone() for x in leaves if x.grad is not None]
        for x in leaves:
            x.grad = None
        if one is y:
            first = gradients
    for ours, true in zip(first, gradients, strict=True):
        torch.testing.assert_close(ours, true, **CLOSE)


def test_it_compiles_whole() -> None:
    leaves = inputs(6)
    q, k, v, sink = leaves

    def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        return fused_attention(q, k, v, causal=True, scale=0.4, sink=sink)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    y, expected = compiled(q, k, v, sink), attend(q, k, v, sink)
    torch.testing.assert_close(y, expected)
    for ours, true in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, true)


def test_the_operator_is_registered_as_torch_asks() -> None:
    from headwise.functional.fused_attention.backends import attention

    q, k, v, sink = inputs(5)
    torch.library.opcheck(
        attention, (q, k, v, None, sink, True, 0, 0.4), test_utils=("test_schema", "test_faketensor")
    )


def test_what_no_kernel_takes_is_known_beforehand() -> None:
    q = torch.randn(1, 2, 5, 8)
    assert takes(q, None)
    assert not takes(q, None, window=3)  # a mask on a CPU
    assert not takes(q, torch.zeros(1, 1, 5, 5, requires_grad=True))
    assert windowed(None, 5, 5, q.device) is None
    near = windowed(torch.zeros(1, 5, 5), 2, 5, q.device)
    assert near is not None
    assert (near == 0).sum() == 5 + 4 + 4
