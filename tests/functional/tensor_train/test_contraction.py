"""The contraction against the dense matrix, its order against all orders, and what it keeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from headwise.functional.tensor_train import (
    FLOP_FORMULAS,
    contraction,
    op,
    plan,
    reconstruct,
    tensor_train_linear,
)

COMPUTE = {getattr(torch.ops.headwise_tensor_train, name).default: f for name, f in op.COMPUTE.items()}

CASES: dict[str, dict[str, Any]] = {
    "one core": {"rows": (5,), "columns": (7,), "ranks": ()},
    "two": {"rows": (4, 6), "columns": (6, 4), "ranks": (3,)},
    "two, padded": {"rows": (3, 5), "columns": (4, 4), "ranks": (2,), "sizes": (14, 13)},
    "three": {"rows": (2, 3, 4), "columns": (4, 3, 2), "ranks": (3, 2)},
    "three, from the middle": {"rows": (3, 3, 3), "columns": (2, 7, 2), "ranks": (2, 2)},
    "three, padded": {"rows": (2, 2, 3), "columns": (3, 2, 2), "ranks": (4, 3), "sizes": (11, 11)},
    "four": {"rows": (2, 2, 2, 3), "columns": (3, 2, 2, 2), "ranks": (2, 3, 2)},
    "factors of one": {"rows": (1, 6), "columns": (8, 1), "ranks": (4,)},
}


def train(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    bonds = (1, *case["ranks"], 1)
    shapes = zip(bonds, case["rows"], case["columns"], bonds[1:], strict=False)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def sizes(case: dict[str, Any]) -> tuple[int, int]:
    return case.get("sizes", (math.prod(case["rows"]), math.prod(case["columns"])))


@pytest.fixture(params=[2**24, 50], ids=["one block", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contraction.BLOCK, "cpu", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_dense_product(name: str) -> None:
    case = CASES[name]
    m, n = sizes(case)
    cores = train(case)
    x = torch.randn(2, 9, n, dtype=torch.float64, requires_grad=True)
    y = tensor_train_linear(x, cores, m)
    dense = x @ reconstruct(cores)[:m, :n].T
    torch.testing.assert_close(y, dense)
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *cores], upstream)
    theirs = torch.autograd.grad(dense, [x, *cores], upstream)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    case = CASES[name]
    m, n = sizes(case)
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *cores: tensor_train_linear(x, cores, m), (x, *train(case)), fast_mode=True
    )


@pytest.mark.usefixtures("blocks")
def test_strided_expanded_and_empty_inputs() -> None:
    case = CASES["two"]
    cores = train(case)
    full = reconstruct(cores)
    base = torch.randn(24, 5, 4, dtype=torch.float64)
    for x in (base.permute(2, 1, 0), base.permute(2, 1, 0)[::2], base[:, :1, 0].T.expand(6, 24)):
        torch.testing.assert_close(tensor_train_linear(x, cores, 24), x @ full.T)
    assert tensor_train_linear(torch.zeros(2, 0, 24, dtype=torch.float64), cores, 24).shape == (2, 0, 24)
    assert tensor_train_linear(torch.ones(24, dtype=torch.float64), cores, 24).shape == (24,)


def test_only_what_needs_a_gradient_gets_one() -> None:
    case = CASES["three"]
    cores = [core.detach() for core in train(case)]
    cores[1].requires_grad_()
    x = torch.randn(4, 24, dtype=torch.float64)
    tensor_train_linear(x, cores, 24).sum().backward()
    assert cores[1].grad is not None
    assert cores[0].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_that_of_a_matrix_product(dtype: torch.dtype) -> None:
    case = {"rows": (24, 32), "columns": (32, 24), "ranks": (8,)}
    cores = [core.detach().to(dtype).requires_grad_() for core in train(case)]
    exact = [core.detach().double().requires_grad_() for core in cores]
    x = torch.randn(64, 768).to(dtype)
    weights = torch.randn(64, 768).to(dtype)
    y, true = tensor_train_linear(x, cores, 768), tensor_train_linear(x.double(), exact, 768)
    y.backward(weights)
    true.backward(weights.double())
    limit = {torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
    for ours, theirs in [(y, true), *((a.grad, b.grad) for a, b in zip(cores, exact, strict=True))]:
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < limit * theirs.norm()


# --- order


def orders(case: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    return itertools.permutations(range(len(case["rows"])))


def counted(case: dict[str, Any], order: tuple[int, ...] | None) -> int:
    """Multiply-adds of a token, as PyTorch counts them while the operator computes."""
    cores = [core.detach() for core in train(case)]
    x = torch.randn(2, math.prod(case["columns"]), dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        contraction.forward(x, cores, 1, contraction.plan_of([core.shape for core in cores], order))
    return counter.get_total_flops() // 4


factors = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3)


@settings(max_examples=20, deadline=None)
@given(factors)
def test_no_order_is_cheaper_than_the_one_chosen(drawn: list[tuple[int, int, int]]) -> None:
    rows, columns, bonds = zip(*drawn, strict=True)
    case = {"rows": rows, "columns": columns, "ranks": bonds[1:]}
    chosen = plan(rows, columns, bonds[1:])
    assert counted(case, None) == chosen.products
    every = [
        (counted(case, order), contraction.plan_in_order(rows, columns, bonds[1:], order).largest)
        for order in orders(case)
    ]
    assert (chosen.products, chosen.largest) == min(every)


@pytest.mark.parametrize("name", ["three", "three, from the middle", "four"])
def test_every_order_gives_the_same(name: str) -> None:
    case = CASES[name]
    cores = train(case)
    x = torch.randn(5, math.prod(case["columns"]), dtype=torch.float64, requires_grad=True)
    expected = x @ reconstruct(cores).T
    gradients = torch.autograd.grad(expected.square().sum(), [x, *cores])
    for order in orders(case):
        y = tensor_train_linear(x, cores, math.prod(case["rows"]), order=order)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [x, *cores]), gradients)


@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_formulas_of_the_operators_are_what_they_compute(name: str, of_x: bool) -> None:
    case = CASES[name]
    m, n = sizes(case)
    cores = train(case)
    x, upstream = (torch.randn(3, size, dtype=torch.float64) for size in (n, m))
    plain = [core.detach() for core in cores]
    order = contraction.plan_of([core.shape for core in cores])
    with FlopCounterMode(display=False) as computed:
        contraction.forward(x, plain, m, order)
        contraction.backward(upstream, x, plain, order, of_x=of_x)
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as told:
        tensor_train_linear(x.requires_grad_(of_x), cores, m).backward(upstream)
    assert told.get_total_flops() == computed.get_total_flops() > 0


def test_the_order_matters_by_hand() -> None:
    # core 1 first: 32·24·24·r, then 24·r·24·32; core 2 first costs as much as its larger state
    chosen = plan((24, 32), (32, 24), (16,))
    assert [step.core for step in chosen.steps] == [0, 1]
    assert chosen.products == 16 * 24 * 24 * (32 + 32)
    assert chosen.largest == 24 * 16 * 24
    assert plan((3, 3, 3), (2, 7, 2), (2, 2)).steps[0].core == 1


# --- memory


class Sizes(TorchDispatchMode):
    """Numbers of every tensor that any operation makes, also inside of the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COMPUTE:
            with self:
                return COMPUTE[func](*args)
        made = func(*args, **(kwargs or {}))
        self.seen += [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        return made


def test_the_matrix_is_never_made() -> None:
    cores = train({"rows": (16, 16), "columns": (16, 16), "ranks": (2,)}, torch.float32)
    x = torch.randn(8, 256, requires_grad=True)
    with Sizes() as sizes:
        tensor_train_linear(x, cores, 256).sum().backward()
    assert max(sizes.seen) == 8 * 16 * 2 * 16 * 1
    assert max(sizes.seen) < 256 * 256


def test_only_the_input_and_the_cores_are_kept_for_the_backward_pass() -> None:
    cores = train({"rows": (8, 8), "columns": (8, 8), "ranks": (4,)}, torch.float32)
    x = torch.randn(300, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tensor_train_linear(x, cores, 64)
    assert sum(t.numel() for t in kept) == x.numel() + sum(core.numel() for core in cores)


def test_states_are_bounded_by_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contraction.BLOCK, "cpu", 5000)
    cores = train({"rows": (8, 8), "columns": (8, 8), "ranks": (4,)}, torch.float32)
    x = torch.randn(70, 64, requires_grad=True)
    with Sizes() as sizes:
        tensor_train_linear(x, cores, 64).sum().backward()
    assert max(sizes.seen) <= max(5000, x.numel())


# --- the operators


@pytest.mark.parametrize("name", ["two, padded", "three", "one core"])
@pytest.mark.parametrize("of_x", [True, False])
def test_the_operators_keep_to_what_pytorch_asks_of_one(name: str, of_x: bool) -> None:
    case = CASES[name]
    m, n = sizes(case)
    cores = train(case)
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=of_x)
    ops = torch.ops.headwise_tensor_train
    torch.library.opcheck(ops.forward.default, (x, cores, m, None))
    plain = (torch.randn(3, m, dtype=torch.float64), x.detach(), [core.detach() for core in cores])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.backward.default, (*plain, None, of_x), test_utils=checks)


@pytest.mark.parametrize("order", [None, (1, 0, 2)])
def test_compiled_whole_it_gives_the_same_to_the_bit(order: tuple[int, ...] | None) -> None:
    case = CASES["three, padded"]
    cores = train(case, torch.float32)
    x = torch.randn(2, 5, 11, requires_grad=True)

    def twice(x: Tensor, *cores: Tensor) -> Tensor:
        y = tensor_train_linear(x, cores, 11, order=order)
        return y * tensor_train_linear(y.relu(), cores, 11, order=order)

    found = []
    for run in (twice, torch.compile(twice, backend="aot_eager", fullgraph=True)):
        y = run(x, *cores)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *cores])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_autocast_leaves_the_dtype() -> None:
    cores = train(CASES["two"], torch.float32)
    x = torch.randn(5, 24, requires_grad=True)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = tensor_train_linear(x, cores, 24)
            found.append([y, *torch.autograd.grad(y.sum(), [x, *cores])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


# --- refusals


def test_refuses_a_second_derivative() -> None:
    cores = train(CASES["two"])
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(tensor_train_linear(x, cores, 24).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


def test_refuses_sizes_that_do_not_fit() -> None:
    cores = train(CASES["two"])
    for x, out in ((torch.zeros(2, 25), 24), (torch.zeros(2, 24), 25), (torch.zeros(2, 24), 0)):
        with pytest.raises(ValueError, match="cores are of a 24 x 24 matrix"):
            tensor_train_linear(x, cores, out)
