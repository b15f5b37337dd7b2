"""Selective attention's definition by its laws and by loops over queries and keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.functional.selective import (
    mask_of_head,
    memory_penalty,
    selection_logits,
    selection_mask,
    selective_attention,
)
from headwise.functional.sharing import kept_context
from headwise.functional.softmax_attention import softmax_attention

laws = settings(max_examples=30, deadline=None)


def random_logits(masks: int = 2, tokens: int = 7) -> Tensor:
    return (2 * torch.randn(2, masks, tokens, tokens, dtype=torch.float64)).tril()


def by_loops(logits: Tensor, bos: bool, own: bool) -> Tensor:
    """F as MECHANISMS writes it."""
    taken = torch.zeros_like(logits)
    tokens = logits.shape[-1]
    for i in range(tokens):
        for j in range(tokens):
            for query in range(i):
                counts = query >= j and not (bos and j == 0) and not (own and query == j)
                if counts:
                    taken[..., i, j] += logits[..., query, j].relu()
    return taken


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_the_mask_is_the_sum_over_earlier_queries(bos: bool, own: bool) -> None:
    torch.manual_seed(0)
    logits = random_logits()
    found = selection_mask(logits, protect_bos=bos, protect_self=own)
    torch.testing.assert_close(found, by_loops(logits, bos, own))


@laws
@given(st.integers(0, 2**31), st.booleans(), st.booleans(), st.booleans())
def test_a_mask_grows_and_spares_what_it_must(seed: int, bos: bool, own: bool, game: bool) -> None:
    torch.manual_seed(seed)
    logits = random_logits()
    protection = torch.rand_like(logits[:, :1]).tril() if game else None
    taken = selection_mask(logits, protection, protect_bos=bos, protect_self=own)
    assert (taken >= 0).all()
    assert (taken.triu() == 0).all()  # nobody came before key j to query j
    below = torch.ones_like(taken).tril(-1).bool()
    later = torch.where(below[..., 1:, :], taken.diff(dim=-2), 0.0)
    assert (later >= 0).all()
    assert not bos or (taken[..., 0] == 0).all()


@laws
@given(st.integers(0, 2**31))
def test_no_protection_is_the_running_sum_and_a_huge_one_is_no_selection(seed: int) -> None:
    torch.manual_seed(seed)
    logits = random_logits()
    plain = selection_mask(logits)
    torch.testing.assert_close(selection_mask(logits, torch.zeros_like(logits)), plain)
    huge = torch.full_like(logits, 50.0).tril()
    assert (selection_mask(logits, huge) == 0).all()


def test_a_leak_and_a_relu_after_the_sum() -> None:
    torch.manual_seed(0)
    logits = random_logits()
    leaky = selection_mask(logits, relu_leak=0.25)
    counted = logits.tril(-1).clone()
    counted[..., 0] = 0
    expected = torch.where(counted > 0, counted, 0.25 * counted).cumsum(-2) - 0.0
    torch.testing.assert_close(leaky[..., 1:, :], expected[..., :-1, :])
    assert (leaky < 0).any()
    moved = selection_mask(logits, relu_leak=1.0, relu_after_cumsum=True)
    torch.testing.assert_close(moved, selection_mask(logits, relu_leak=1.0).relu())


def test_logits_are_scaled_products_and_their_bias_stays_out_of_the_future() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 1, 5, 4)
    bias = torch.tensor([1.0, -1.0, 2.0])
    found = selection_logits(q, k, scale=0.5, bias=bias)
    expected = torch.einsum("bmie,bje->bmij", q, k[:, 0]) * 0.5 + bias[:, None, None]
    torch.testing.assert_close(found, expected.tril())
    assert (found.triu(1) == 0).all()


def test_attention_without_a_mask_is_softmax_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 5), torch.randn(2, 2, 6, 5), torch.randn(2, 2, 6, 5)
    found = selective_attention(q, k, v, torch.zeros(2, 1, 6, 6))
    torch.testing.assert_close(found, softmax_attention(q, k, v))


@pytest.mark.parametrize(("heads", "masks"), [(4, 1), (4, 2), (5, 2), (4, 4)])
def test_each_head_is_softmax_attention_under_its_own_mask(heads: int, masks: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, heads, 6, 5)
    taken = selection_mask(random_logits(masks, 6)).float()
    found = selective_attention(q, k, v, taken)
    for head, mask in enumerate(mask_of_head(heads, masks)):
        one = slice(head, head + 1)
        expected = softmax_attention(q[:, one], k[:, one], v[:, one], mask=-taken[:, mask])
        torch.testing.assert_close(found[:, one], expected)


def test_masks_go_to_contiguous_groups_and_the_rest_wraps() -> None:
    assert mask_of_head(6, 2) == [0, 0, 0, 1, 1, 1]
    assert mask_of_head(13, 2) == [0] * 6 + [1] * 6 + [0]
    assert mask_of_head(8, 3) == [0, 0, 1, 1, 2, 2, 0, 1]
    assert mask_of_head(3, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="5 masks for 4 heads"):
        mask_of_head(4, 5)


def test_memory_counts_the_keys_that_are_left() -> None:
    taken = torch.zeros(1, 1, 3, 3)
    taken[0, 0, 2, 1] = 0.25
    taken[0, 0, 2, 0] = 7.0
    assert kept_context(taken)[0, 0].tolist() == [1.0, 2.0, 1.75]
    assert kept_context(taken, tau=0.5)[0, 0].tolist() == [1.0, 2.0, 1.5]
    assert memory_penalty(taken).item() == pytest.approx(2 / 3)
    assert memory_penalty(taken, reduce="mean").item() == pytest.approx(4.75 / 9)


@pytest.mark.parametrize("switches", [{}, {"relu_leak": 0.3}, {"protect_bos": False, "protect_self": False}])
@pytest.mark.parametrize("game", [False, True])
def test_gradients_are_those_of_finite_differences(switches: dict[str, float], game: bool) -> None:
    if game and "relu_leak" in switches:
        pytest.skip("the game needs attacks of at least 0")
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 5, 3, dtype=torch.float64).requires_grad_().unbind()
    heads = torch.randn(3, 1, 2, 5, 3, dtype=torch.float64)

    def run(q: Tensor, k: Tensor, guard: Tensor, *qkv: Tensor) -> Tensor:
        logits = selection_logits(q, k, scale=1.0)
        protection = selection_logits(guard, k, scale=1.0).relu() if game else None
        taken = selection_mask(logits, protection, **switches)  # type: ignore[arg-type]
        return selective_attention(*qkv, taken).sum() + memory_penalty(taken)

    guard = torch.randn_like(q)
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, guard, *heads)]
    assert torch.autograd.gradcheck(run, inputs)
