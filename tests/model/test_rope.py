"""Rotary positions by their laws: relative, norm-preserving, the same tables however they grew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.model.rope import Rope

laws = settings(max_examples=25, deadline=None)
widths = st.integers(1, 8).map(lambda half: 2 * half)
seeds = st.integers(0, 2**31)


def heads(seed: int, length: int, width: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, length, width, generator=generator, dtype=torch.float64)


@laws
@given(seeds, widths, st.integers(2, 12))
def test_a_score_depends_on_the_distance_only(seed: int, width: int, length: int) -> None:
    rope = Rope(width, length=length).double()
    q = heads(seed, 1, width).expand(-1, -1, length, -1)
    k = heads(seed + 1, 1, width).expand(-1, -1, length, -1)
    q, k = rope(q, k)
    scores = q @ k.transpose(-2, -1)
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1])
    if width > 2:
        assert not torch.allclose(scores[..., 0], scores[..., 0, :1].expand_as(scores[..., 0]))


@laws
@given(seeds, widths, st.integers(1, 40))
def test_rotation_keeps_the_norm_and_leaves_the_first_token(seed: int, width: int, length: int) -> None:
    q, k = heads(seed, length, width), heads(seed + 1, length, width, count=1)
    for before, after in zip((q, k), Rope(width, length=length).double()(q, k), strict=True):
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
        assert torch.equal(after[..., 0, :], before[..., 0, :])


def test_pairs_turn_as_complex_numbers() -> None:
    width, length, theta = 6, 10, 500.0
    x = heads(0, length, width)
    frequency = torch.tensor([theta ** (-2 * d / width) for d in range(width // 2)], dtype=torch.float64)
    angle = torch.arange(length)[:, None] * frequency
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    found, _ = Rope(width, theta, length).double()(x, x)
    torch.testing.assert_close(found, torch.cat((turned.real, turned.imag), dim=-1))


def test_tables_that_grew_equal_fresh_ones() -> None:
    grown, fresh = Rope(8, length=4), Rope(8, length=50)
    q = heads(0, 50, 8).float()
    assert torch.equal(grown(q, q)[0], fresh(q, q)[0])
    assert torch.equal(grown.cos, fresh.cos)
    assert torch.equal(grown.sin, fresh.sin)
    assert torch.equal(grown(q[..., :3, :], q[..., :3, :])[0], fresh(q, q)[0][..., :3, :])


def test_bf16_is_rotated_in_float32() -> None:
    q = heads(0, 3000, 8).bfloat16()
    rope = Rope(8, length=3000)
    found, _ = rope(q, q)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rope(q.float(), q.float())[0].bfloat16())


def test_casting_the_model_does_not_round_the_tables() -> None:
    exact = Rope(8, length=3000).double()
    assert exact.cos.dtype == torch.float64
    rope = Rope(8, length=3000).bfloat16()
    assert rope.cos.dtype == torch.float32
    torch.testing.assert_close(rope.cos.double(), exact.cos, atol=1e-7, rtol=0)
    back = Rope(8, length=3000).half().double()
    assert torch.equal(back.sin, exact.sin)


def test_tables_are_no_part_of_a_checkpoint() -> None:
    assert not Rope(8).state_dict()


def test_an_odd_head_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim is 7"):
        Rope(7)
