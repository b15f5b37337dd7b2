"""Running sums, and the game of attack and protection, against the game played turn by turn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.functional.selective.scan import SUMS, after_the_query, attack_and_protect, running_sum

laws = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)


def turn_by_turn(attack: Tensor, protection: Tensor) -> Tensor:
    """The rules as the selective attention log states them."""
    left = torch.zeros_like(attack[..., 0, :])
    damage = torch.zeros_like(left)
    turns = []
    for a, p in zip(attack.unbind(-2), protection.unbind(-2), strict=True):
        damage = damage + (a - left).relu()
        left = (left - a).relu() + p
        turns.append(damage)
    return torch.stack(turns, dim=-2)


def by_the_rule(attack: Tensor, protection: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients as in the selective attention log's kernel: a key is vulnerable at t when P <= a_t."""
    d_attack, d_protection = torch.zeros_like(attack), torch.zeros_like(protection)
    tokens = attack.shape[-2]
    rest = upstream.flip(-2).cumsum(-2).flip(-2)
    for column in range(attack.shape[-1]):
        left, vulnerable = torch.zeros((), dtype=attack.dtype), []
        for t in range(tokens):
            a = attack[t, column]
            vulnerable.append(bool(left <= a))
            left = (left - a).relu() + protection[t, column]
        for i in range(tokens):
            at = next((t for t in range(i, tokens) if vulnerable[t]), None)
            d_attack[i, column] = 0.0 if at is None else rest[at, column]
            after = next((t for t in range(i + 1, tokens) if vulnerable[t]), None)
            d_protection[i, column] = 0.0 if after is None else -rest[after, column]
    return d_attack, d_protection


def a_game(seed: int, tokens: int = 9, sharp: bool = False) -> tuple[Tensor, Tensor]:
    """Attacks and protections, many of them 0; small integers when `sharp`, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    a, p = torch.randn(2, tokens, tokens, generator=generator, dtype=torch.float64).relu().tril()
    return (a.mul(2).round(), p.mul(2).round()) if sharp else (a, p)


@laws
@given(seeds, st.booleans())
def test_the_closed_form_plays_the_game(seed: int, sharp: bool) -> None:
    attack, protection = a_game(seed, sharp=sharp)
    torch.testing.assert_close(attack_and_protect(attack, protection), turn_by_turn(attack, protection))


@laws
@given(seeds, st.booleans())
def test_gradients_follow_the_rule_at_ties_too(seed: int, sharp: bool) -> None:
    attack, protection = a_game(seed, sharp=sharp)
    upstream = torch.randn(attack.shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    a, p = attack.clone().requires_grad_(), protection.clone().requires_grad_()
    found = torch.autograd.grad((attack_and_protect(a, p) * upstream).sum(), (a, p))
    for gradient, expected in zip(found, by_the_rule(attack, protection, upstream), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    a, p = (torch.rand(2, 6, 6, dtype=torch.float64).add(0.05).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(attack_and_protect, (a, p))


@laws
@given(seeds)
def test_damage_never_decreases_and_no_protection_is_the_running_sum(seed: int) -> None:
    attack, protection = a_game(seed)
    assert (attack_and_protect(attack, protection).diff(dim=-2) >= 0).all()
    nothing = torch.zeros_like(attack)
    torch.testing.assert_close(attack_and_protect(attack, nothing), attack.cumsum(-2))


@pytest.mark.parametrize("accumulate", SUMS)
def test_every_sum_is_the_sum_and_its_gradient_the_sum_from_behind(accumulate: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 7, dtype=torch.float64, requires_grad=True)
    total = running_sum(x, accumulate)
    torch.testing.assert_close(total, x.cumsum(-2))
    upstream = torch.randn_like(total)
    (gradient,) = torch.autograd.grad(total, x, upstream)
    torch.testing.assert_close(gradient, upstream.flip(-2).cumsum(-2).flip(-2))


def test_float64_is_the_most_exact_and_sequential_the_least() -> None:
    torch.manual_seed(0)
    x = torch.rand(4096, 8)
    exact = x.double().cumsum(-2)
    error = {name: (running_sum(x, name) - exact).abs().max().item() for name in SUMS}
    assert error["float64"] <= error["torch"] <= error["sequential"]
    assert error["sequential"] > 5 * error["float64"]


def test_an_unknown_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast'"):
        running_sum(torch.zeros(2, 2), "fast")


def test_what_a_query_does_counts_for_later_ones_only() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(after_the_query(x), torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 3.0]]))
