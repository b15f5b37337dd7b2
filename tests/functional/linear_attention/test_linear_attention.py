"""Linear attention block by block against every weight in memory, in float64, and its features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headwise.functional.linear_attention import (
    elu_features,
    linear_attention,
    linear_weights,
    orthogonal_features,
    positive_features,
    real_keys,
)
from headwise.functional.softmax_attention import softmax_attention


def features(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.01


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_give_what_all_weights_give(tokens: int, kv_heads: int, causal: bool) -> None:
    q, k = features(2, 4, tokens, 5), features(2, kv_heads, tokens, 5)
    v = torch.randn(2, kv_heads, tokens, 3, dtype=torch.float64)
    every = v.repeat_interleave(4 // kv_heads, 1)
    expected = linear_weights(q, k, causal=causal) @ every
    torch.testing.assert_close(linear_attention(q, k, v, causal=causal, block=8), expected)
    real = torch.rand(2, tokens) < 0.5
    padding = real[:, None].expand(-1, tokens, -1)
    expected = linear_weights(q, k, mask=padding, causal=causal) @ every
    torch.testing.assert_close(linear_attention(q, k, v, real=real, causal=causal, block=8), expected)
    mask = torch.rand(2, tokens, tokens) < 0.5
    expected = linear_weights(q, k, mask=mask, causal=causal) @ every
    torch.testing.assert_close(linear_attention(q, k, v, mask=mask, causal=causal, block=8), expected)


def test_weights_are_positive_and_sum_to_one() -> None:
    q, k = elu_features(4 * torch.randn(1, 2, 9, 4)), elu_features(4 * torch.randn(1, 2, 9, 4))
    mask = torch.rand(1, 9, 9) < 0.5
    mask[0, 3] = False
    weights = linear_weights(q, k, mask=mask)
    sees = (mask & (torch.ones(9, 9).tril() > 0)).any(-1)[:, None].expand(1, 2, 9)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), sees.float())


@pytest.mark.parametrize("causal", [True, False])
def test_keys_that_all_queries_see_are_found(causal: bool) -> None:
    real = torch.tensor([[False, True, True, False, True], [True] * 5])
    padding = real[:, None].expand(-1, 5, -1)
    found = real_keys(padding, causal=causal)
    assert found is not None
    assert torch.equal(found, real)
    window = torch.ones(5, 5).tril().triu(-1)[None] > 0
    assert real_keys(window, causal=causal) is None


def test_gradients() -> None:
    q, k = features(1, 2, 6, 3).requires_grad_(), features(1, 1, 6, 3).requires_grad_()
    v = torch.randn(1, 1, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, block=4), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, causal=False), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 300, 16).to(dtype) for _ in range(3))
    directions = orthogonal_features(32, 16, 0)
    both = [
        (elu_features(q), elu_features(k)),
        tuple(
            positive_features(x, directions, scale=0.25, of_queries=own) for x, own in ((q, True), (k, False))
        ),
    ]
    for phi_q, phi_k in both:
        exact = linear_weights(phi_q.double(), phi_k.double()) @ v.double()
        y = linear_attention(phi_q, phi_k, v)
        assert y.isfinite().all()
        assert (y.double() - exact).norm() < 0.02 * exact.norm()


def test_long_sequences_make_no_square_tensor() -> None:
    tokens = 1 << 16
    q, k = torch.rand(1, 1, tokens, 2), torch.rand(1, 1, tokens, 2)
    v = torch.ones(1, 1, tokens, 2)  # T x T would be 17 GB
    torch.testing.assert_close(linear_attention(q, k, v), v, atol=1e-4, rtol=0)


def test_directions_are_orthogonal_and_repeat() -> None:
    directions = orthogonal_features(20, 8, 3).double()
    unit = directions / directions.norm(dim=-1, keepdim=True)
    for block in (unit[:8], unit[8:16], unit[16:]):
        torch.testing.assert_close(block @ block.mT, torch.eye(len(block)).double(), atol=1e-6, rtol=0)
    before = torch.random.get_rng_state()
    assert torch.equal(orthogonal_features(20, 8, 3).double(), directions)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(orthogonal_features(20, 8, 4).double(), directions)
    many = orthogonal_features(8000, 8, 0).double()
    torch.testing.assert_close(many.mT @ many / 8000, torch.eye(8).double(), atol=0.06, rtol=0)


def test_many_random_features_are_the_softmax() -> None:
    # short vectors: the variance of an estimate grows as e^(‖q+k‖²)
    q, k, v = (torch.randn(1, 1, 12, 8, dtype=torch.float64) / 2 for _ in range(3))
    exact, errors = softmax_attention(q, k, v), []
    for n in (16, 16384):
        directions = orthogonal_features(n, 8, 0)
        phi_q, phi_k = (
            positive_features(x, directions, scale=8**-0.5, of_queries=own)
            for x, own in ((q, True), (k, False))
        )
        errors.append(float((linear_attention(phi_q, phi_k, v) - exact).norm() / exact.norm()))
    assert errors[1] < 0.05
    assert errors[1] < errors[0]


@pytest.mark.parametrize("size", [0.0, 1.0, 8.0, 40.0, 1e4])
def test_features_of_any_size_stay_finite_with_their_gradients(size: float) -> None:
    directions = orthogonal_features(16, 8, 0)
    q, k, v = ((size * torch.randn(1, 1, 9, 8)).requires_grad_() for _ in range(3))
    ways = [
        (elu_features(q), elu_features(k)),
        (positive_features(q, directions, scale=8**-0.5, of_queries=True),
         positive_features(k, directions, scale=8**-0.5, of_queries=False)),
    ]  # fmt: skip
    for phi_q, phi_k in ways:
        y = linear_attention(phi_q, phi_k, v)
        gradients = torch.autograd.grad(y.sum(), (q, k, v), retain_graph=True)
        assert all(x.isfinite().all() for x in (y, *gradients))
