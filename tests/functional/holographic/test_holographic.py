"""Holographic operations against what is written down, pair by pair, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headwise.functional.holographic import (
    bind,
    own_weight,
    poincare_attention,
    poincare_scores,
    project,
    reference,
    retrieve,
    unbind,
)
from headwise.functional.running_sum import exclusive_sum, running_sum

WIDTHS = [1, 2, 6, 7, 16, 64]


def heads(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_pair_bound_and_unbound_is_the_value(width: int) -> None:
    k, v = heads(5, width), heads(5, width)
    torch.testing.assert_close(unbind(k, bind(k, v)), v)
    single = unbind(k.float(), bind(k.float(), v.float()))
    torch.testing.assert_close(single, v.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_retrieval_is_the_sum_over_visible_pairs(width: int, causal: bool) -> None:
    tokens = 9
    q, k, v = heads(2, 4, tokens, width), heads(2, 2, tokens, width), heads(2, 2, tokens, width)
    mask = torch.rand(2, tokens, tokens) < 0.5
    k_all, v_all = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    form = torch.ones(tokens, tokens).tril() > 0 if causal else torch.ones(tokens, tokens) > 0
    for given, visible in ((None, form[None, None]), (mask, (mask & form)[:, None])):
        expected = reference.retrieve(q, k_all, v_all, visible)
        torch.testing.assert_close(retrieve(q, k, v, mask=given, causal=causal), expected)


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_running_sums_in_blocks_are_running_sums(tokens: int) -> None:
    x = heads(2, tokens, 3)
    torch.testing.assert_close(running_sum(x), x.cumsum(-2))
    torch.testing.assert_close(exclusive_sum(x), x.cumsum(-2) - x)
    changed = x.clone()
    changed[:, tokens // 2 :] += 1
    before = slice(0, tokens // 2)
    assert torch.equal(running_sum(changed)[:, before], running_sum(x)[:, before])


def test_a_long_causal_superposition_has_no_square_tensor() -> None:
    tokens = 1 << 15
    q, k, v = (torch.randn(1, 1, tokens, 4) for _ in range(3))  # T x T would be 4 GB
    y = retrieve(q, k, v)
    last = retrieve(q[:, :, -1:], k.sum(2, keepdim=True), v[:, :, :1])
    assert y.shape == (1, 1, tokens, 4)
    assert last.isfinite().all()
    exact = retrieve(q.double(), k.double(), v.double())
    assert (y - exact).norm() < 1e-4 * exact.norm()


def test_gradients_of_retrieval() -> None:
    q, k, v = (heads(1, 2, 5, 6).requires_grad_() for _ in range(3))
    mask = torch.rand(1, 5, 5) < 0.6
    for given in (None, mask):
        assert torch.autograd.gradcheck(lambda *x, m=given: retrieve(*x, mask=m), (q, k, v), fast_mode=True)


def test_nothing_is_retrieved_of_zeros_and_gradients_are_finite() -> None:
    q, k, v = (torch.zeros(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    y = retrieve(q, k, v)
    y.sum().backward()
    assert (y == 0).all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("causal", [True, False])
def test_own_weights_are_those_of_a_softmax(causal: bool) -> None:
    tokens, temperature = 6, torch.tensor([0.5, 3.0], dtype=torch.float64)
    a = heads(2, 2, tokens).requires_grad_()
    logits = (a * temperature[:, None]).detach()
    form = torch.ones(tokens, tokens).tril() > 0 if causal else torch.ones(tokens, tokens) > 0
    mask = torch.rand(2, tokens, tokens) < 0.5
    mask[0, 2], mask[1, 4, 4] = False, False
    for given, visible in ((None, form.expand(2, -1, -1)), (mask, mask & form)):
        e = torch.where(visible[:, None], logits.exp()[:, :, None], 0.0)
        own = e.diagonal(dim1=-2, dim2=-1)
        expected = torch.where(own > 0, own / e.sum(-1), 0.0)
        found = own_weight(a, temperature, mask=given, causal=causal)
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found.sum(), a)
        assert gradient.isfinite().all()


# --- the Poincaré ball


@pytest.mark.parametrize("curvature", [0.2, 1.0, 3.0])
def test_scores_are_distances_of_projected_points(curvature: float) -> None:
    q, k = heads(2, 5, 6), heads(2, 7, 6)
    u, v = project(q, curvature), project(k, curvature)
    expected = -reference.poincare_distance(u[:, :, None], v[:, None], curvature)
    torch.testing.assert_close(poincare_scores(q, k, curvature), expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("curvature", [0.2, 1.0])
def test_distances_from_the_origin_are_twice_the_length(curvature: float) -> None:
    x = heads(4, 5)
    found = poincare_scores(torch.zeros(1, 5, dtype=torch.float64), x, curvature)
    torch.testing.assert_close(-found[0], 2 * x.norm(dim=-1), atol=1e-5, rtol=1e-5)


def test_points_stay_inside_whatever_their_length() -> None:
    x = torch.tensor([[1e-30, 0.0], [1.0, 1.0], [1e4, 0.0], [1e15, -1e15]], requires_grad=True)
    for curvature in (0.1, 1.0, 10.0):
        u = project(x, curvature, 1e-4)
        assert (curvature**0.5 * u.norm(dim=-1) <= 1 - 0.9e-4).all()
        scores = poincare_scores(x, x, curvature)
        (gradient,) = torch.autograd.grad(scores.sum() + u.sum(), x)
        assert scores.isfinite().all()
        assert gradient.isfinite().all()


def test_gradients_are_finite_at_the_origin_and_where_points_meet() -> None:
    q = torch.stack((torch.zeros(4), torch.randn(4), torch.ones(4))).requires_grad_()
    k = q.detach().clone().requires_grad_()
    c = torch.ones((), requires_grad=True)
    poincare_scores(q, k, c).sum().backward()
    for x in (q, k, c):
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert q.grad is not None
    assert (q.grad[1:] != 0).any()


def test_float32_distances_are_close_near_the_boundary() -> None:
    q, k = 3 * torch.randn(64, 64), 3 * torch.randn(64, 64)
    exact = poincare_scores(q.double(), k.double(), 1.0)
    torch.testing.assert_close(poincare_scores(q, k, 1.0).double(), exact, atol=1e-3, rtol=1e-4)


def test_gradients_of_attention_by_distance() -> None:
    q, k, v = heads(1, 2, 5, 4), heads(1, 1, 5, 4), heads(1, 1, 5, 4)
    c, tau = torch.tensor(0.7, dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    mask = torch.rand(1, 5, 5) < 0.6
    leaves = [x.requires_grad_() for x in (q, k, v, c, tau)]

    def run(q: Tensor, k: Tensor, v: Tensor, c: Tensor, tau: Tensor) -> Tensor:
        return poincare_attention(q, k, v, curvature=c, temperature=tau, mask=mask)

    assert torch.autograd.gradcheck(run, leaves)
