"""Tropical attention against its definition: on a grid every sum is exact, and results agree to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from headwise.functional.tropical import (
    FLOP_FORMULAS,
    chunked,
    definition,
    op,
    slot_attention,
    tropical_attention,
)

SHAPES = [(2, 4, 2, 9, 5), (1, 3, 1, 1, 4), (1, 2, 2, 40, 16)]
"""B, H, K, T, D."""


def grid(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Multiples of 1/16: sums are exact and ties are many."""
    return torch.randint(-32, 32, shape).to(dtype) / 16


def drawn(b: int, h: int, kv: int, t: int, d: int) -> list[Tensor]:
    return [grid(b, n, t, d).requires_grad_() for n in (h, kv, kv)]


def mask_of(form: str, batch: int, tokens: int) -> Tensor | None:
    """Some rows see nothing."""
    seen = torch.rand(batch, tokens, tokens) < 0.4
    if form == "bool":
        return seen
    return torch.where(seen[:1], grid(1, tokens, tokens), -torch.inf) if form == "additive" else None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["none", "bool", "additive"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("centre", [True, False])
def test_outputs_margins_and_gradients_are_those_of_the_definition(
    shape: tuple[int, ...], form: str, causal: bool, centre: bool
) -> None:
    ours = drawn(*shape)
    exact = [x.detach().clone().requires_grad_() for x in ours]
    options: dict[str, Any] = {
        "causal": causal, "centre": centre, "mask": mask_of(form, shape[0], shape[3])
    }  # fmt: skip
    y, margin = tropical_attention(*ours, margin=True, **options)
    true, gamma = definition(*exact, **options)
    assert torch.equal(y, true)
    assert torch.equal(margin, gamma)
    upstream = grid(*true.shape)
    for a, b in zip(
        torch.autograd.grad(y, ours, upstream), torch.autograd.grad(true, exact, upstream), strict=True
    ):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(tropical_attention(*ours, **options).y, true)


@pytest.mark.parametrize("centre", [True, False])
def test_gradients_are_those_of_finite_differences(centre: bool) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(lambda *x: tropical_attention(*x, centre=centre).y, (q, k, v))


def test_memory_is_bounded_by_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = drawn(2, 2, 1, 13, 4)
    whole = tropical_attention(*leaves, margin=True)
    monkeypatch.setattr(chunked, "AT_ONCE", 100)
    parts = tropical_attention(*leaves, margin=True)
    assert torch.equal(parts.y, whole.y)
    assert torch.equal(parts.margin, whole.margin)


def test_the_first_of_equal_winners_has_the_whole_gradient() -> None:
    q, k, v = (torch.zeros(1, 1, 4, 3, requires_grad=True) for _ in range(3))
    tropical_attention(q, k, v).y.sum().backward()
    assert q.grad[0, 0].tolist() == [[3.0, 0.0, 0.0]] * 4
    assert k.grad[0, 0].tolist() == [[12.0, 0.0, 0.0]] + [[0.0] * 3] * 3
    assert v.grad[0, 0].tolist() == [[4.0] * 3] + [[0.0] * 3] * 3


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 6), st.booleans(), st.booleans())
def test_values_that_move_by_less_than_half_the_margin_change_no_winner(
    seed: int, tokens: int, width: int, causal: bool, centre: bool
) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, tokens, width, dtype=torch.float64).unbind()
    margin = tropical_attention(q, k, v, causal=causal, centre=centre, margin=True).margin
    winner = op.forward(q, k, v, None, causal, True, False, False)[2]
    for i in range(tokens):
        half = margin[0, :, i, None, None].clamp(max=1e6) / 2
        towards = torch.where(torch.rand_like(v) < 0.5, -1.0, 1.0)
        # The worst move: against the winner of some channel, and for all others.
        towards[0, :, :, 0] = 1.0
        towards[0, range(2), winner[0, :, i, 0].long(), 0] = -1.0
        moved = v + 0.999 * half * towards
        assert torch.equal(
            op.forward(q, k, moved, None, causal, True, False, False)[2][:, :, i], winner[:, :, i]
        )


def test_a_move_by_more_than_half_the_margin_can_change_a_winner() -> None:
    q, k, v = torch.randn(3, 1, 1, 8, 3, dtype=torch.float64).unbind()
    margin = tropical_attention(q, k, v, causal=False, margin=True).margin[0, 0, 7]
    winner = op.forward(q, k, v, None, False, True, False, False)[2][0, 0, 7].long()
    changed = 0
    for d in range(3):
        moved = v + 0.501 * margin
        moved[0, 0, winner[d], d] = v[0, 0, winner[d], d] - 0.501 * margin
        changed += int(op.forward(q, k, moved, None, False, True, False, False)[2][0, 0, 7, d] != winner[d])
    assert changed == 1


def test_a_query_has_a_margin_where_it_sees_two_keys() -> None:
    q, k, v = torch.randn(3, 1, 1, 3, 2).unbind()
    mask = torch.tensor([[[True, True, True], [False, True, True], [True, False, True]]])
    margin = tropical_attention(q, k, v, mask=mask, margin=True).margin[0, 0]
    assert margin[:2].tolist() == [math.inf, math.inf]
    assert margin[2].isfinite()
    least = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert torch.equal(tropical_attention(q, k, v, mask=least, margin=True).margin[0, 0], margin)


@pytest.mark.parametrize("hidden", [False, -math.inf, torch.finfo(torch.float32).min])
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(hidden: bool | float) -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 3, requires_grad=True).unbind()
    mask = torch.full((1, 4, 4), True if hidden is False else 0.0)
    mask[0, 2] = hidden
    for centre in (False, True):
        y, margin = tropical_attention(q, k, v, mask=mask, centre=centre, margin=True)
        assert (y[:, :, 2] == 0).all()
        assert (margin[:, :, 2] == math.inf).all()
        (gradient,) = torch.autograd.grad(y.sum() + y.square().sum(), q)
        assert gradient.isfinite().all()
        assert (gradient[:, :, 2] == 0).all()
        assert centre or (gradient[:, :, 3] != 0).any()  # what a centred row is given may cancel


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_reaches_what_depends_on_it_and_nothing_else(name: str) -> None:
    given_ = dict(zip("qkv", torch.randn(3, 1, 1, 6, 3).unbind(), strict=True))
    was = tropical_attention(**given_).y
    given_[name][0, 0, 2, 1] = torch.nan
    y = tropical_attention(**given_, margin=True).y
    rows = torch.tensor([name == "q", name != "q", name != "q", name != "q"])
    assert torch.equal(y[0, 0, :2], was[0, 0, :2])
    assert torch.equal(y[0, 0, 2:].isnan().any(-1), rows | torch.tensor([True, False, False, False]))


def test_half_precision_is_computed_in_float32() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8).bfloat16().unbind()
    y, margin = tropical_attention(q, k, v, centre=True, margin=True)
    exact, gamma = definition(*(x.float() for x in (q, k, v)), centre=True)
    assert y.dtype == torch.bfloat16
    assert margin.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, atol=1e-6, rtol=2.0**-8)
    torch.testing.assert_close(margin, gamma, atol=1e-5, rtol=1e-5)


def test_slots_that_are_empty_offer_nothing() -> None:
    q, k, v = grid(2, 3, 2, 4), grid(2, 3, 7, 4), grid(2, 3, 7, 4)
    hidden = torch.zeros(2, 3, 2, 7, dtype=torch.bool)
    hidden[..., 5:] = True
    few = [x[:, :, :5].repeat_interleave(2, 1) for x in (k, v)]
    score = (q[:, :, :, None] + few[0][:, ::2, None]).amax(-1)
    expected = (score[..., None] + few[1][:, ::2, None]).amax(-2)
    assert torch.equal(slot_attention(q, k, v, hidden), expected)
    centred = expected - score.amax(-1, keepdim=True)
    assert torch.equal(slot_attention(q, k, v, hidden, centre=True), centred)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4)), r"q must be \(B, H, T, D\)"),
        (((1, 2, 0, 4), (1, 2, 0, 4), (1, 2, 0, 4)), "must not be empty"),
        (((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4)), "agree in B, T and D"),
        (((1, 3, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), "divisible"),
    ],
)
def test_refuses_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tropical_attention(*(torch.randn(shape) for shape in shapes))


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 3000), st.floats(-20, 20))
def test_integers_of_the_fixed_unit_add_up_without_overflow_and_to_rounding(
    seed: int, count: int, size: float
) -> None:
    torch.manual_seed(seed)
    numbers = torch.randn(count, dtype=torch.float64) * 10.0**size
    unit = chunked.fixed_unit(numbers.abs().amax(), count).double()
    whole = (numbers * unit).round().long()
    assert whole.abs().double().sum() < 2.0**63
    total = whole[torch.randperm(count)].sum()
    assert total == whole.sum()
    assert abs(total.double() / unit - numbers.sum()) <= count * 2.0**-44 * numbers.abs().amax()


def test_gradients_that_are_not_finite_have_no_fixed_unit() -> None:
    unit = chunked.fixed_unit(torch.tensor([1.0, math.inf, math.nan, 0.0]), 10)
    assert unit.isnan().tolist() == [False, True, True, False]


class Counted(TorchDispatchMode):
    """Counts the sums and maxima that plain PyTorch makes of tensors with `dims` axes."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims, self.operations = dims, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add.Tensor and out.dim() == self.dims:
            self.operations += out.numel()
        elif func in (torch.ops.aten.max.dim, torch.ops.aten.argmax.default) and args[0].dim() == self.dims:
            self.operations += args[0].numel()
        return out


@pytest.mark.parametrize("centre", [False, True])
def test_flops_are_the_operations_of_the_plain_form(centre: bool) -> None:
    b, h, kv, t, d = 2, 4, 2, 7, 5
    leaves = drawn(b, h, kv, t, d)
    with Counted(5) as forward:
        definition(*leaves, causal=False)
    assert forward.operations == 4 * b * h * t * t * d
    winner, top_winner = op.forward(*leaves, None, False, True, False, False)[2:4]
    with Counted(5) as backward:  # which channel wins the score of each winner
        of_score = torch.cat((winner, top_winner[..., None]), -1) if centre else winner
        at = of_score.long().flatten(2)[..., None].expand(-1, -1, -1, d)
        theirs = leaves[1].repeat_interleave(h // kv, 1).gather(2, at).unflatten(2, (t, -1))
        (leaves[0][:, :, :, None] + theirs).argmax(-1)
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        y = tropical_attention(*leaves, causal=False, centre=centre).y
        assert counter.get_total_flops() == forward.operations
        y.sum().backward()
    assert counter.get_total_flops() == forward.operations + backward.operations
