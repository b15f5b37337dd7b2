"""Differential attention: what it is, what it becomes at the ends, and that one fused call gives the same."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from headwise.functional.differential import (
    differential_attention,
    fused_differential_attention,
    head_norm,
    joined,
    lambda_start,
    negative_weight,
    widened,
)
from headwise.functional.softmax_attention import softmax_attention

B, H, T = 2, 6, 7

LAYOUTS = pytest.mark.parametrize("own_keys", [True, False], ids=["own keys", "shared keys"])


def inputs(own_keys: bool, kv_heads: int = 2, tokens: int = T, width: int = 4) -> list[Tensor]:
    """q, k, v and λ in float64."""
    keys = (2 if own_keys else 1) * kv_heads
    shapes = ((B, 2 * H, tokens, width), (B, keys, tokens, width), (B, kv_heads, tokens, 6 + 2 * own_keys))
    q, k, v = (2 * torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [q, k, v, torch.rand(B, H, tokens, dtype=torch.float64)]


def masks(tokens: int = T) -> list[Tensor | None]:
    visible = torch.rand(B, tokens, tokens) < 0.6
    visible[0, tokens // 2] = False
    added = torch.randn(1, tokens, tokens, dtype=torch.float64).masked_fill(~visible[:1], -torch.inf)
    return [None, visible, added]


@LAYOUTS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_it_is_the_difference_of_two_softmax_attentions(own_keys: bool, causal: bool, kv_heads: int) -> None:
    q, k, v, lam = inputs(own_keys, kv_heads)
    keys = 2 if own_keys else 1
    for mask in masks():
        first, second = (
            softmax_attention(q[:, n::2], k[:, n % keys :: keys], v, causal=causal, mask=mask) for n in (0, 1)
        )
        y = differential_attention(q, k, v, lam, causal=causal, mask=mask)
        torch.testing.assert_close(y, first - lam[..., None] * second)


@LAYOUTS
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_calls_of_softmax_attention_give_the_same(own_keys: bool, tokens: int, apart: bool) -> None:
    q, k, v, lam = inputs(own_keys, tokens=tokens)
    for causal in (True, False):
        for mask in masks(tokens):
            softmax = partial(softmax_attention, causal=causal, mask=mask, scale=0.3)
            fused = fused_differential_attention(q, k, v, lam, softmax, apart=apart)
            torch.testing.assert_close(
                fused, differential_attention(q, k, v, lam, causal=causal, mask=mask, scale=0.3)
            )
    softmax = partial(F.scaled_dot_product_attention, is_causal=True, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(
        fused_differential_attention(q, k, v, lam, softmax, apart=apart),
        differential_attention(q, k, v, lam, scale=0.5),
    )


@LAYOUTS
def test_without_the_second_softmax_it_is_the_first(own_keys: bool) -> None:
    q, k, v, lam = inputs(own_keys)
    alone = softmax_attention(q[:, ::2], k[:, ::2] if own_keys else k, v)
    torch.testing.assert_close(differential_attention(q, k, v, 0 * lam), alone)


def test_two_equal_softmaxes_leave_one_minus_lambda_of_one() -> None:
    q, k, v, lam = inputs(own_keys=False)
    q[:, 1::2] = q[:, ::2]
    y = differential_attention(q, k, v, lam)
    torch.testing.assert_close(y, (1 - lam[..., None]) * softmax_attention(q[:, ::2], k, v))
    assert negative_weight(q, k, lam, n_kv_heads=2).max() == 0


@LAYOUTS
def test_gradients_are_those_of_finite_differences(own_keys: bool) -> None:
    given = [x[:1, :, :4].requires_grad_() for x in inputs(own_keys)]
    mask = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    mask[0, 1] = False
    softmax = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    run = partial(differential_attention, mask=mask)
    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    fused = partial(fused_differential_attention, softmax=softmax)
    assert torch.autograd.gradcheck(fused, given, fast_mode=True)


def test_zeros_beside_a_query_meet_the_key_of_the_other() -> None:
    q, k, _, _ = inputs(own_keys=True, kv_heads=H)
    wide = widened(q) @ joined(k).repeat_interleave(2, 1).transpose(-2, -1)
    torch.testing.assert_close(wide, q @ k.transpose(-2, -1))


@LAYOUTS
@pytest.mark.parametrize("at_once", [1, 500, 1 << 24])
def test_negative_weight_is_the_weight_below_zero(own_keys: bool, at_once: int) -> None:
    q, k, _, lam = inputs(own_keys)
    identity = torch.eye(T, dtype=torch.float64).expand(B, 2, T, T)  # values that give the weights themselves
    for causal in (True, False):
        for mask in masks():
            weights = differential_attention(q, k, identity, lam, causal=causal, mask=mask)
            found = negative_weight(
                q, k, lam, n_kv_heads=2, causal=causal, mask=mask, at_once=at_once
            )  # fmt: skip
            assert found.shape == (B, H, T)
            torch.testing.assert_close(found, (-weights).relu().sum(-1))
    assert (found > 0).any()


def test_negative_weight_shows_damage() -> None:
    q, k, _, lam = inputs(own_keys=False)
    q[0, 3, 2] = torch.nan
    damaged = negative_weight(q, k, lam, n_kv_heads=2).isnan()
    assert damaged[0, 1, 2]
    assert damaged.sum() == 1


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_negative_weight_never_holds_all_weights() -> None:
    tokens, rows = 64, 4
    q, k, _, lam = inputs(own_keys=False, tokens=tokens)
    with Largest() as largest:
        negative_weight(q, k, lam, n_kv_heads=2, at_once=2 * B * H * tokens * rows)
    assert largest.elements <= 2 * B * H * tokens * rows


def test_lambda_starts_as_the_paper_has_it() -> None:
    assert [round(lambda_start(layer), 4) for layer in (0, 1, 2)] == [0.2, 0.3555, 0.4707]
    assert math.isclose(lambda_start(100), 0.8, abs_tol=1e-9)


def test_the_norm_of_a_head_is_rmsnorm_times_a_factor() -> None:
    y, weight = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    expected = 0.3 * weight * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head_norm(y, weight, 0.3), expected)
    assert head_norm(torch.zeros(1, 1, 1, 8), torch.ones(8), 1.0).eq(0).all()
    assert head_norm(y.bfloat16(), weight.float(), 0.3).dtype == torch.bfloat16
