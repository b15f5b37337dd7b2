"""Softmax attention's definition by its laws, and the masks that all kinds share."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.functional.softmax_attention import additive_mask, softmax_attention, zero_rows

laws = settings(max_examples=25, deadline=None)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))


def random_qkv(seed: int, length: int, kv_heads: int, group: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (kv_heads * group, kv_heads, kv_heads)
    return [torch.randn(2, h, length, width, generator=generator, dtype=torch.float64) for h in heads]


def test_two_tokens_by_hand() -> None:
    q = torch.tensor([[[[1.0], [2.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3.0)]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    # the second query has logits 0 and 2·ln 3, so weights 1/10 and 9/10; the first sees itself alone
    y = softmax_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(y, torch.tensor([[[[4.0], [7.6]]]]))
    full = softmax_attention(q, k, v, scale=1.0, causal=False)
    torch.testing.assert_close(full, torch.tensor([[[[7.0], [7.6]]]]))


@laws
@given(st.integers(0, 2**31), sizes, st.booleans())
def test_weights_are_an_average(seed: int, shape: tuple[int, ...], causal: bool) -> None:
    q, k, v = random_qkv(seed, *shape)
    constant = torch.full_like(v, 3.5)
    expected = torch.full_like(q, 3.5)
    torch.testing.assert_close(softmax_attention(q, k, constant, causal=causal), expected)
    y = softmax_attention(q, k, v, causal=causal)
    assert y.max() <= v.max() + 1e-12
    assert y.min() >= v.min() - 1e-12


@laws
@given(st.integers(0, 2**31), sizes)
def test_the_order_of_keys_does_not_matter_without_causality(seed: int, shape: tuple[int, ...]) -> None:
    q, k, v = random_qkv(seed, *shape)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    shuffled = softmax_attention(q, k[:, :, order], v[:, :, order], causal=False)
    torch.testing.assert_close(shuffled, softmax_attention(q, k, v, causal=False))


@laws
@given(st.integers(0, 2**31), sizes)
def test_adding_one_number_to_a_row_of_scores_changes_nothing(seed: int, shape: tuple[int, ...]) -> None:
    q, k, v = random_qkv(seed, *shape)
    shift = q[:, 0, :, :1].expand(-1, -1, shape[0])
    torch.testing.assert_close(softmax_attention(q, k, v, mask=shift), softmax_attention(q, k, v))


@laws
@given(st.integers(0, 2**31), sizes)
def test_query_heads_read_the_key_value_head_of_their_group(seed: int, shape: tuple[int, ...]) -> None:
    q, k, v = random_qkv(seed, *shape)
    y, group = softmax_attention(q, k, v), shape[2]
    for h in range(q.shape[1]):
        kv = slice(h // group, h // group + 1)
        alone = softmax_attention(q[:, h : h + 1], k[:, kv], v[:, kv])
        torch.testing.assert_close(y[:, h : h + 1], alone)


def test_scale_is_one_over_the_root_of_the_width_unless_given() -> None:
    q, k, v = random_qkv(0, 4, 2, 1, 9)
    assert torch.equal(softmax_attention(q, k, v), softmax_attention(q, k, v, scale=1 / 3))
    assert not torch.allclose(softmax_attention(q, k, v), softmax_attention(q, k, v, scale=1 / 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(0, 6, 2, 2, 8)
    y = softmax_attention(q.to(dtype), k.to(dtype), v.to(dtype))
    assert y.dtype == dtype
    exact = softmax_attention(*(x.to(dtype).double() for x in (q, k, v)))
    torch.testing.assert_close(y.double(), exact, atol=16 * torch.finfo(dtype).eps, rtol=0)


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k, _ = random_qkv(0, 5, 1, 1, 4)
    v = torch.ones(2, 1, 5, 4, dtype=torch.float64)
    draws = torch.stack([softmax_attention(q, k, v, dropout=0.3) for _ in range(2000)])
    assert draws.std() > 0.1
    torch.testing.assert_close(draws.mean(0), torch.ones_like(v), atol=0.1, rtol=0)


def test_no_mask_and_no_causality_need_no_bias() -> None:
    assert additive_mask(None, causal=False, length=3, like=torch.zeros(1)) == (None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_causality_alone_hides_the_future_and_leaves_no_row_empty(dtype: torch.dtype) -> None:
    bias, empty = additive_mask(None, causal=True, length=3, like=torch.zeros(1, dtype=dtype))
    inf = torch.inf
    expected = torch.tensor([[0.0, -inf, -inf], [0.0, 0.0, -inf], [0.0, 0.0, 0.0]], dtype=dtype)
    assert empty is None
    assert bias is not None
    assert torch.equal(bias, expected[None, None])
    assert bias.dtype == dtype


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_without_keys_is_marked_and_holds_no_infinity(as_float: bool, causal: bool) -> None:
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    mask[0, 1, :2] = False  # sees the future only: empty where causal
    mask[1, 2] = False  # sees nothing
    given = torch.zeros(2, 3, 3).masked_fill(~mask, -torch.inf) if as_float else mask
    bias, empty = additive_mask(given, causal=causal, length=3, like=torch.zeros(1))
    assert bias is not None
    assert empty is not None
    assert bias.shape == (2, 1, 3, 3)
    assert empty[..., 0].nonzero().tolist() == ([[0, 0, 1]] if causal else []) + [[1, 0, 2]]
    assert bias.logsumexp(-1).isfinite().all()
    visible = mask.tril() if causal else mask
    full_rows = ~empty[:, 0, :, 0]
    assert torch.equal((bias[:, 0] == 0)[full_rows], visible[full_rows])


def test_additive_values_survive() -> None:
    mask = torch.randn(1, 4, 4)
    bias, _ = additive_mask(mask, causal=True, length=4, like=torch.zeros(1))
    assert bias is not None
    visible = torch.ones(4, 4).tril().bool()
    assert torch.equal(bias[0, 0][visible], mask[0][visible])
    assert (bias[0, 0][~visible] == -torch.inf).all()


def test_zero_rows_overwrites_even_what_is_not_a_number() -> None:
    y = torch.full((2, 3, 4, 5), torch.nan)
    empty = torch.ones(1, 1, 4, 1, dtype=torch.bool)
    assert (zero_rows(y, empty) == 0).all()
    assert zero_rows(y, None) is y
