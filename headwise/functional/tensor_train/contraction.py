"""y = W x for a matrix W in tensor-train form, core by core: W is never made.

The state starts as x with axes `(n_1, …, n_d)` and ends as y with axes `(m_1, …, m_d)`. Contracting core k
puts m_k in the place of n_k; the rank r_k stands between places k and k+1 while one of the two cores is
contracted and the other is not. So what a core is contracted with always lies side by side, and each step
is one matrix product on `(left, summed, right)` without moving a number, whatever the order of the cores.

The states between the cores can be larger than x: by r·m_1/n_1 after the first of two cores. They are not
kept for the backward pass, which computes them again, and tokens are taken in blocks so that few of them
exist at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from headwise.functional.tensor_train.decomposition import check_cores

BLOCK = {"cuda": 2**24, "cpu": 2**18}
"""Numbers of the largest state of a block of tokens: what the caches of a device hold."""


class Step(NamedTuple):
    """One core's contraction, per token: `(left, summed, right)` to `(left, made, right)`."""

    core: int
    left: int
    summed: int
    made: int
    right: int
    axes: tuple[int, ...]
    """The core's axes `(r, m, n, r')` in the order (made, summed)."""

    @property
    def products(self) -> int:
        """Multiply-adds per token."""
        return self.left * self.summed * self.made * self.right

    @property
    def entering(self) -> int:
        """Numbers of the state before it, per token."""
        return self.left * self.summed * self.right

    @property
    def size(self) -> int:
        """Numbers of the state after it, per token."""
        return self.left * self.made * self.right


class Plan(NamedTuple):
    """In which order the cores are contracted, and what that costs per token.

    Attributes:
        steps: in order.
        products: multiply-adds.
        largest: numbers of the largest state between two cores.
    """

    steps: tuple[Step, ...]
    products: int
    largest: int


Factors = tuple[int, ...]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def plan(rows: Factors, columns: Factors, ranks: Factors) -> Plan:
    """The order of least cost; of several, the one whose largest state is smallest.

    The state depends on which cores are done and not on their order, so the best order of a set of cores
    continues the best order of a smaller one.

    Args:
        rows, columns: m_k and n_k.
        ranks: r_1 to r_{d-1}.
    """
    return _plan(rows, columns, ranks)


@cache
def _plan(rows: Factors, columns: Factors, ranks: Factors) -> Plan:
    d = len(rows)
    best: dict[frozenset[int], Plan] = {frozenset(): Plan((), 0, 0)}
    for count in range(d):
        for done in map(frozenset, itertools.combinations(range(d), count)):
            for core in set(range(d)) - done:
                found = _extended(best[done], _step(rows, columns, ranks, done, core), last=count == d - 1)
                known = best.get(done | {core})
                if known is None or found[1:] < known[1:]:
                    best[done | {core}] = found
    return best[frozenset(range(d))]


def plan_in_order(rows: Factors, columns: Factors, ranks: Factors, order: Sequence[int]) -> Plan:
    """The plan that contracts the cores in the given order."""
    found = Plan((), 0, 0)
    for count, core in enumerate(order, start=1):
        step = _step(rows, columns, ranks, frozenset(order[: count - 1]), core)
        found = _extended(found, step, last=count == len(order))
    return found


def tensor_train_linear(
    x: Tensor, cores: Sequence[Tensor], out_features: int, *, order: Plan | None = None
) -> Tensor:
    """`W x` with W in tensor-train form (Novikov et al. 2015), in the cheapest order.

    Keeps x and the cores for the backward pass, and nothing else; first derivatives only.

    Args:
        x: `(…, N)`, floating-point; zeros pad it to Π n_k.
        cores: `(r_{k-1}, m_k, n_k, r_k)`, of x's dtype and device.
        out_features: M, at most Π m_k; what is beyond it is cut off.
        order: another order than the cheapest.

    Returns:
        `(…, M)`.

    Raises:
        ValueError: cores that do not meet, or sizes that do not fit them.
    """
    check_cores(cores)
    rows, columns, ranks = shape_of(cores)
    inputs, outputs = math.prod(columns), math.prod(rows)
    if x.shape[-1] > inputs or not 0 < out_features <= outputs:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and out_features is {out_features}; "
            f"cores are of a {outputs} x {inputs} matrix"
        )
    order = order or plan(rows, columns, ranks)
    tokens = x.reshape(-1, x.shape[-1])
    y: Tensor = _Contraction.apply(tokens, order, out_features, *cores)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], out_features)


def shape_of(cores: Sequence[Tensor]) -> tuple[Factors, Factors, Factors]:
    """m_k, n_k, and the inner ranks of the cores of a matrix."""
    rows, columns = (tuple(core.shape[axis] for core in cores) for axis in (1, 2))
    return rows, columns, tuple(core.shape[0] for core in cores[1:])


def _extended(before: Plan, step: Step, *, last: bool) -> Plan:
    largest = before.largest if last else max(before.largest, step.size)
    return Plan((*before.steps, step), before.products + step.products, largest)


def _step(rows: Factors, columns: Factors, ranks: Factors, done: frozenset[int], core: int) -> Step:
    """The contraction of `core` after those in `done`."""
    bonds = (1, *ranks, 1)
    before, after = core - 1 in done, core + 1 in done

    def size(places: range) -> int:
        open_bonds = [bonds[k + 1] for k in places if k + 1 in places and (k in done) != (k + 1 in done)]
        return math.prod([rows[k] if k in done else columns[k] for k in places] + open_bonds)

    # a rank is summed over where the neighbour that has it too is done, and is made where it is not
    made = [*([] if before else [0]), 1, *([] if after else [3])]
    summed = [*([0] if before else []), 2, *([3] if after else [])]
    sizes = (bonds[core], rows[core], columns[core], bonds[core + 1])
    return Step(
        core, size(range(core)), math.prod(sizes[axis] for axis in summed),
        math.prod(sizes[axis] for axis in made), size(range(core + 1, len(rows))), (*made, *summed),
    )  # fmt: skip


class _Contraction(torch.autograd.Function):
    """`x (tokens, N)`, the plan, M and the cores to `y (tokens, M)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Plan, out_features: int, *cores: Tensor) -> Tensor:
        ctx.save_for_backward(x, *cores)
        ctx.order, ctx.out_features = order, out_features
        matrices = _matrices(cores, order)
        blocks = []
        for block in x.split(_tokens_of_block(x, order)):
            state = _padded(block, order)
            for step, matrix in zip(order.steps, matrices, strict=True):
                state = _forward(state, matrix, step)
            blocks.append(state.reshape(len(block), order.steps[-1].size)[:, :out_features])
        return torch.cat(blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, *cores = ctx.saved_tensors
        order: Plan = ctx.order
        matrices = _matrices(cores, order)
        exact = torch.promote_types(x.dtype, torch.float32)
        sums = [torch.zeros_like(matrix, dtype=exact) for matrix in matrices]
        size, blocks = _tokens_of_block(x, order), []
        for block, dy in zip(x.split(size), upstream.split(size), strict=True):
            states = [_padded(block, order)]
            for step, matrix in zip(order.steps[:-1], matrices[:-1], strict=True):
                states.append(_forward(states[-1], matrix, step))
            last = order.steps[-1]
            gradient = _zero_padded(dy, last.size)
            for at in reversed(range(len(order.steps))):
                step, matrix = order.steps[at], matrices[at]
                sums[at] += _matrix_gradient(states.pop(), gradient, step)
                if at or ctx.needs_input_grad[0]:
                    gradient = _backward(gradient, matrix, step)
            if ctx.needs_input_grad[0]:
                blocks.append(gradient.reshape(len(block), order.steps[0].entering)[:, : x.shape[1]])
        found: list[Tensor | None] = [None] * len(cores)
        for step, matrix_gradient in zip(order.steps, sums, strict=True):
            core = cores[step.core]
            moved = [core.shape[axis] for axis in step.axes]
            back = sorted(range(4), key=step.axes.__getitem__)
            found[step.core] = matrix_gradient.view(moved).permute(back).to(core.dtype)
        return (torch.cat(blocks) if blocks else None, None, None, *found)


def _tokens_of_block(x: Tensor, order: Plan) -> int:
    numbers = BLOCK.get(x.device.type, BLOCK["cuda"])
    return max(1, numbers // max(order.largest, 1))


def _matrices(cores: Sequence[Tensor], order: Plan) -> list[Tensor]:
    """Of each step, the core as `(made, summed)`."""
    return [cores[step.core].permute(step.axes).reshape(step.made, step.summed) for step in order.steps]


def _padded(block: Tensor, order: Plan) -> Tensor:
    """The first state: `(tokens, Π n_k)`."""
    return _zero_padded(block, order.steps[0].entering)


def _zero_padded(block: Tensor, size: int) -> Tensor:
    return F.pad(block, (0, size - block.shape[1])) if size > block.shape[1] else block


def _forward(state: Tensor, matrix: Tensor, step: Step) -> Tensor:
    if step.right == 1:
        return _cut(state, step.summed) @ matrix.T
    state = _cut(state, step.summed, step.right)
    return torch.bmm(matrix.expand(len(state), -1, -1), state)


def _backward(gradient: Tensor, matrix: Tensor, step: Step) -> Tensor:
    if step.right == 1:
        return _cut(gradient, step.made) @ matrix
    gradient = _cut(gradient, step.made, step.right)
    return torch.bmm(matrix.T.expand(len(gradient), -1, -1), gradient)


def _matrix_gradient(state: Tensor, gradient: Tensor, step: Step) -> Tensor:
    if step.right == 1:
        return _cut(gradient, step.made).T @ _cut(state, step.summed)
    state = _cut(state, step.summed, step.right)
    gradient = _cut(gradient, step.made, step.right)
    return torch.einsum("amc,akc->mk", gradient, state)


def _cut(state: Tensor, *sizes: int) -> Tensor:
    """`(…, *sizes)`, with all tokens and what is left of the core in one axis; also of no tokens."""
    return state.reshape(state.numel() // math.prod(sizes), *sizes)
