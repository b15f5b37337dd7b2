"""Laws of entanglement entropy, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.functional import entanglement
from headwise.functional.entanglement import entanglement_entropy, regional_entropy

sides = st.integers(1, 12)
seeds = st.integers(0, 2**31)
fast = settings(max_examples=30)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_singular_values(weights: Tensor) -> Tensor:
    """The definition, term by term."""
    squares = torch.linalg.svdvals(weights).square()
    p = squares / squares.sum(-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(-1)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(drawn(size, size, seed=seed)).Q


@fast
@given(rows=sides, columns=sides, seed=seeds)
def test_it_is_the_definition_within_its_bounds(rows: int, columns: int, seed: int) -> None:
    weights = drawn(3, rows, columns, seed=seed)
    found = entanglement_entropy(weights)
    torch.testing.assert_close(found, by_singular_values(weights), atol=1e-9, rtol=0)
    assert (found >= 0).all()
    assert (found <= math.log(min(rows, columns)) + 1e-12).all()


@fast
@given(rows=sides, columns=sides, seed=seeds, factor=st.sampled_from([1e-200, -3.0, 1e200]))
def test_scale_rotation_order_and_transposition_change_nothing(
    rows: int, columns: int, seed: int, factor: float
) -> None:
    weights = drawn(rows, columns, seed=seed)
    expected = entanglement_entropy(weights)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    for same in (
        factor * weights, weights.mT, weights[order],
        rotation(rows, seed + 1) @ weights @ rotation(columns, seed + 2),
    ):  # fmt: skip
        torch.testing.assert_close(entanglement_entropy(same), expected, atol=1e-9, rtol=0)


@given(size=st.integers(1, 40))
@fast
def test_the_identity_has_the_most_and_one_row_repeated_none(size: int) -> None:
    assert entanglement_entropy(torch.eye(size)).item() == pytest.approx(math.log(size), abs=1e-12)
    uniform = torch.full((size, size), 1 / size)
    assert entanglement_entropy(uniform).item() == pytest.approx(0, abs=1e-12)
    outer = drawn(size, 1, seed=size) @ drawn(1, size, seed=size + 1)
    assert entanglement_entropy(outer).item() == pytest.approx(0, abs=1e-12)


@fast
@given(rows=sides, columns=sides, seed=seeds, data=st.data())
def test_regions_are_those_of_the_rows_and_one_region_is_the_whole(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    weights = drawn(2, rows, columns, seed=seed)
    n_regions = data.draw(st.integers(1, rows))
    found = regional_entropy(weights, n_regions)
    assert found.shape == (2, n_regions)
    sizes = [rows // n_regions + (region < rows % n_regions) for region in range(n_regions)]
    for region, part in enumerate(weights.split(sizes, dim=1)):
        torch.testing.assert_close(found[:, region], entanglement_entropy(part))
    torch.testing.assert_close(regional_entropy(weights, 1)[:, 0], entanglement_entropy(weights))


def test_what_is_no_state_is_nan_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.eye(4).repeat(4, 1, 1)
    weights[1] = 0
    weights[2, 0, 0] = torch.nan
    weights[3, 0, 0] = torch.inf
    monkeypatch.setattr(entanglement, "AT_ONCE", 1)
    found = entanglement_entropy(weights)
    assert found.isnan().tolist() == [False, True, True, True]
    assert found[0].item() == pytest.approx(math.log(4))


def test_leading_dimensions_stay_and_dtypes_agree() -> None:
    weights = torch.rand(2, 3, 5, 5).softmax(-1)
    found = entanglement_entropy(weights)
    assert (found.shape, found.dtype) == ((2, 3), torch.float64)
    torch.testing.assert_close(entanglement_entropy(weights.double()), found, atol=1e-6, rtol=0)
    torch.testing.assert_close(entanglement_entropy(weights.bfloat16()), found, atol=0.05, rtol=0)
    assert entanglement_entropy(torch.empty(0, 5, 5)).shape == (0,)


@pytest.mark.parametrize("n_regions", [0, 4])
def test_regions_without_a_row_are_refused(n_regions: int) -> None:
    with pytest.raises(ValueError, match="n_regions"):
        regional_entropy(torch.eye(3), n_regions)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0)])
def test_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        entanglement_entropy(torch.empty(shape))
