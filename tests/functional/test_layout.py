"""Kernels read rows that are near and aligned: in place where they are, otherwise from a copy."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from headwise.bench.layouts import LAYOUTS, laid_out
from headwise.functional import dispatch
from headwise.functional.layout import ALIGNED, FARTHEST, REACH, packed


def aligned(x: Tensor) -> bool:
    steps = x.stride()[:-1]
    beside = x.stride(-1) == 1 or x.shape[-1] == 1
    return beside and x.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps)


@given(
    layout=st.sampled_from(LAYOUTS),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 40)),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
)
def test_a_kernel_reads_the_same_numbers_from_aligned_rows(
    layout: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = laid_out(torch.randn(shape).to(dtype), layout)
    read = packed(x)
    assert torch.equal(read, x)
    assert aligned(read)
    assert (read is x) == aligned(x)


def test_heads_that_lie_inside_are_read_in_place() -> None:
    x = torch.randn(2, 7, 3, 80).transpose(1, 2)
    assert packed(x) is x
    assert packed(x[:, 1:]).data_ptr() == x[:, 1:].data_ptr()


@pytest.mark.parametrize("step", [8, 24, 1608])
def test_strides_of_16_bytes_are_not_enough_in_16_bits(step: int) -> None:
    x = torch.zeros(30000, dtype=torch.bfloat16).as_strided((2, 3, 8), (step * 16, step, 1))
    read = packed(x)
    assert (read is x) == (step % ALIGNED == 0)
    assert aligned(read)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 3, 16), (REACH, 16, 1)), ((3, 2, 16), (REACH // 2, 16, 1)), ((2, 3, 16), (48, FARTHEST, 1))],
)
def test_few_numbers_far_apart_are_copied(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    room = sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1
    x = torch.empty(room, dtype=torch.float16).as_strided(shape, strides).copy_(torch.randn(shape))
    read = packed(x)
    assert read.is_contiguous()
    assert torch.equal(read, x)


@pytest.mark.parametrize(
    ("width", "dtype", "fits"),
    [(64, torch.bfloat16, True), (17, torch.bfloat16, False), (18, torch.float16, True),
     (17, torch.float32, True), (130, torch.float32, False), (64, torch.float64, False)],
)  # fmt: skip
def test_an_odd_width_in_16_bits_goes_the_plain_way(
    width: int, dtype: torch.dtype, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "HAS_KERNELS", True)
    with FakeTensorMode():
        x = torch.empty(2, 1, 3, width, dtype=dtype, device="cuda")
    assert dispatch.fits_kernel(x) == fits


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_traced_program_knows_the_layout_of_gradients(layout: str) -> None:
    from headwise.functional.selective.kernel_masked import gradients_like

    q = laid_out(torch.randn(2, 3, 5, 24), layout)
    mode = FakeTensorMode()
    with mode:
        expected = gradients_like(mode.from_tensor(q), mode.from_tensor(q))
    assert [x.stride() for x in gradients_like(q, q)] == [x.stride() for x in expected]
