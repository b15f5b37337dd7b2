"""TT-SVD: exact at full rank, within its bound below, and the matrix form of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.functional.tensor_train import (
    even_factors,
    exact_factors,
    maximal_ranks,
    reconstruct,
    tensor_train,
    tensor_train_matrix,
    truncation_errors,
)

DOUBLE = {"dtype": torch.float64}
sizes_of_tensors = st.lists(st.integers(1, 5), min_size=1, max_size=5)
few = settings(max_examples=40, deadline=None)


def ragged(sizes: list[int], seed: int) -> torch.Tensor:
    """Random numbers whose unfoldings have singular values of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    rough = torch.randn(sizes, generator=draw, **DOUBLE)
    return rough * torch.rand(sizes, generator=draw, **DOUBLE) ** 4


@few
@given(sizes_of_tensors, st.integers(0, 2**20))
def test_exact_at_the_maximal_ranks(sizes: list[int], seed: int) -> None:
    tensor = ragged(sizes, seed)
    cores = tensor_train(tensor, maximal_ranks(sizes))
    ranks = [1, *maximal_ranks(sizes), 1]
    assert [tuple(core.shape) for core in cores] == [*zip(ranks, sizes, ranks[1:], strict=False)]
    torch.testing.assert_close(reconstruct(cores), tensor)


@few
@given(sizes_of_tensors, st.integers(0, 2**20), st.data())
def test_the_error_is_within_the_bound_and_not_below_the_best(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    tensor = ragged(sizes, seed)
    ranks = [data.draw(st.integers(1, most)) for most in maximal_ranks(sizes)]
    error = (tensor - reconstruct(tensor_train(tensor, ranks))).norm().item()
    single = truncation_errors(tensor, ranks)
    rounding = 1e-12 * (1 + tensor.norm().item())
    assert error <= single.norm().item() + rounding
    assert error >= max(single.tolist(), default=0.0) - rounding  # no tensor of these ranks is nearer


@few
@given(sizes_of_tensors, st.integers(0, 2**20))
def test_a_tensor_of_low_rank_is_found_again(sizes: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    ranks = [1, *(min(2, most) for most in maximal_ranks(sizes)), 1]
    shapes = zip(ranks, sizes, ranks[1:], strict=False)
    tensor = reconstruct([torch.randn(shape, generator=draw, **DOUBLE) for shape in shapes])
    torch.testing.assert_close(reconstruct(tensor_train(tensor, 2)), tensor)


def test_an_entry_is_the_product_of_its_matrices() -> None:
    cores = [torch.randn(shape, **DOUBLE) for shape in ((1, 3, 2), (2, 4, 3), (3, 2, 1))]
    full = reconstruct(cores)
    for i, j, k in itertools.product(range(3), range(4), range(2)):
        entry = cores[0][:, i] @ cores[1][:, j] @ cores[2][:, k]
        torch.testing.assert_close(full[i, j, k], entry[0, 0])


def test_all_cores_but_the_last_are_orthonormal() -> None:
    for core in tensor_train(torch.randn(4, 3, 5, **DOUBLE), 3)[:-1]:
        columns = core.flatten(0, 1)
        torch.testing.assert_close(columns.T @ columns, torch.eye(core.shape[-1], **DOUBLE))


@pytest.mark.parametrize(("shape", "rows", "columns"), [
    ((6, 6), (2, 3), (3, 2)), ((7, 5), (2, 4), (3, 2)), ((23, 12), (2, 3, 4), (3, 2, 2)),
    ((1, 1), (2,), (3,)),
])  # fmt: skip
def test_a_matrix_is_exact_at_full_rank_padding_included(
    shape: tuple[int, int], rows: tuple[int, ...], columns: tuple[int, ...]
) -> None:
    matrix = torch.randn(shape, **DOUBLE)
    cores = tensor_train_matrix(matrix, rows, columns, math.prod(rows) * math.prod(columns))
    assert [core.shape[1:3] for core in cores] == [*zip(rows, columns, strict=True)]
    full = reconstruct(cores)
    assert full.shape == (math.prod(rows), math.prod(columns))
    torch.testing.assert_close(full[: shape[0], : shape[1]], matrix)
    torch.testing.assert_close(full.norm(), matrix.norm())  # the padding is 0


def test_gradients_pass_through_reconstruction() -> None:
    cores = [torch.randn(shape, **DOUBLE, requires_grad=True) for shape in ((1, 2, 3, 2), (2, 3, 2, 1))]
    assert torch.autograd.gradcheck(lambda *some: reconstruct(some), cores)


@pytest.mark.parametrize(("ranks", "message"), [
    ([2, 2, 2], "3 ranks"), ([0, 2], "at least 1"), ([2, 9], r"at most \[4, 5\]"), (0, "at least 1"),
])  # fmt: skip
def test_refuses_ranks_that_cannot_be(ranks: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tensor_train(torch.randn(4, 3, 5), ranks)


def test_refuses_what_is_no_train() -> None:
    for shapes in ([(1, 2, 3), (2, 2, 1)], [(2, 2, 1)], [(1, 2, 2), (2, 2, 2, 1)], [(1, 1)]):
        with pytest.raises(ValueError, match="cores have shapes"):
            reconstruct([torch.zeros(shape) for shape in shapes])
    with pytest.raises(ValueError, match="at least one entry"):
        tensor_train(torch.tensor(1.0), 1)
    with pytest.raises(ValueError, match="does not fit rows"):
        tensor_train_matrix(torch.zeros(7, 4), (2, 3), (2, 2), 1)


# --- factors


@few
@given(st.integers(2, 4), st.integers(0, 5000))
def test_factors_are_even_and_pad_little(n: int, above: int) -> None:
    size = 2**n + above
    factors = even_factors(size, n)
    product = math.prod(factors)
    assert list(factors) == sorted(factors)
    assert factors[-1] <= 2 * factors[0]
    assert size <= product <= size * 1.5
    if size >= 100 * n:
        assert product <= size * 1.1
    for less in range(size, product):  # it is the least padding
        exact = exact_factors(less, n)
        assert exact is None or exact[-1] > 2 * exact[0]


@pytest.mark.parametrize(("size", "n", "factors"), [
    (768, 2, (24, 32)), (768, 3, (8, 8, 12)), (128, 2, (8, 16)), (128, 3, (4, 4, 8)), (769, 2, (22, 35)),
    (13, 2, (3, 5)), (4, 2, (2, 2)), (4096, 4, (8, 8, 8, 8)), (11, 1, (11,)),
])  # fmt: skip
def test_factors_by_hand(size: int, n: int, factors: tuple[int, ...]) -> None:
    assert even_factors(size, n) == factors


@few
@given(st.integers(1, 3), st.integers(1, 60))
def test_exact_factors_have_the_least_sum(n: int, size: int) -> None:
    every = itertools.combinations_with_replacement(range(2, size + 1), n)
    ways = [way for way in every if math.prod(way) == size]
    found = exact_factors(size, n)
    assert (found is None) == (not ways)
    if found is not None:
        assert math.prod(found) == size
        assert sum(found) == min(map(sum, ways))


def test_refuses_factors_of_one() -> None:
    with pytest.raises(ValueError, match="7 has no 3 factors of at least 2"):
        even_factors(7, 3)
