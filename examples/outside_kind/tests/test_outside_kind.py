"""The kind of this package: its definition, its kernel and its cache against each other."""

from __future__ import annotations

import pytest
import torch
from outside_kind.functional import log_sum_exp, nothing_attention

from headwise.attention import KINDS


def inputs(heads: int = 4, kv_heads: int = 2, tokens: int = 9) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q = torch.randn(2, heads, tokens, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, tokens, 8, dtype=torch.float64)
    return q, k, v, torch.randn(heads, dtype=torch.float64)


def test_the_package_registers_its_kind() -> None:
    assert KINDS["nothing"].__module__ == "outside_kind.layer"


def test_a_very_low_offset_is_softmax_attention() -> None:
    q, k, v, offset = inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(nothing_attention(q, k, v, torch.full_like(offset, -1e4)), expected)


def test_the_output_is_softmax_attention_less_what_goes_to_nothing() -> None:
    q, k, v, offset = inputs()
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    keeps = torch.sigmoid(log_sum_exp(q, k, scale=8**-0.5) - offset[:, None])
    torch.testing.assert_close(nothing_attention(q, k, v, offset), softmax * keeps[..., None])


def test_gradients_are_those_of_finite_differences() -> None:
    values = [x.requires_grad_() for x in inputs(tokens=4)]
    assert torch.autograd.gradcheck(nothing_attention, values, fast_mode=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on a GPU")
@pytest.mark.parametrize("tokens", [1, 63, 200])
def test_the_kernel_agrees_with_the_definition(tokens: int) -> None:
    q, k, v, offset = (x.cuda() for x in inputs(tokens=tokens))
    found = nothing_attention(*(x.float() for x in (q, k, v, offset)))
    torch.testing.assert_close(found.double(), nothing_attention(q, k, v, offset), atol=1e-5, rtol=1e-4)
