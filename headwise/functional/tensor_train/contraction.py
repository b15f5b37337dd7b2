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
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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


@cache
def plan(rows: Factors, columns: Factors, ranks: Factors) -> Plan:
    """The order of least cost; of several, the one whose largest state is smallest.

    The state depends on which cores are done and not on their order, so the best order of a set of cores
    continues the best order of a smaller one.

    Args:
        rows, columns: m_k and n_k.
        ranks: r_1 to r_{d-1}.
    """
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


def plan_of(cores: Sequence[Sequence[int]], order: Sequence[int] | None = None) -> Plan:
    """The plan of cores of these shapes: that of least cost where no order is given."""
    rows, columns = (tuple(core[axis] for core in cores) for axis in (1, 2))
    ranks = tuple(core[0] for core in cores[1:])
    return plan(rows, columns, ranks) if order is None else plan_in_order(rows, columns, ranks, order)


def backward_products(order: Plan, *, of_x: bool = True) -> int:
    """Multiply-adds of `backward` per token: two for each of `forward`, which is made again but for its last.

    Args:
        of_x: whether x needs a gradient.
    """
    again = order.products - order.steps[-1].products
    return again + 2 * order.products - (0 if of_x else order.steps[0].products)


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


def forward(x: Tensor, cores: Sequence[Tensor], out_features: int, order: Plan) -> Tensor:
    """y `(tokens, M)`, in memory of its own.

    Args:
        x: `(tokens, N)`.
        cores: `(r_{k-1}, m_k, n_k, r_k)`, of x's dtype and device.
        out_features: M.
        order: of these cores.
    """
    matrices = _matrices(cores, order)
    blocks = []
    for block in x.split(_tokens_of_block(x, order)):
        state = _padded(block, order)
        for step, matrix in zip(order.steps, matrices, strict=True):
            state = _forward(state, matrix, step)
        blocks.append(state.reshape(len(block), order.steps[-1].size)[:, :out_features])
    return torch.cat(blocks)


def backward(
    upstream: Tensor, x: Tensor, cores: Sequence[Tensor], order: Plan, *, of_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x, where it is asked for, and of the cores; all contiguous.

    Args:
        upstream: the gradient of y, `(tokens, M)`.
        x, cores, order: as `forward` had them.
        of_x: whether x needs one.
    """
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
            if at or of_x:
                gradient = _backward(gradient, matrix, step)
        if of_x:
            blocks.append(gradient.reshape(len(block), order.steps[0].entering)[:, : x.shape[1]])
    found: dict[int, Tensor] = {}
    for step, matrix_gradient in zip(order.steps, sums, strict=True):
        core = cores[step.core]
        moved = [core.shape[axis] for axis in step.axes]
        back = sorted(range(4), key=step.axes.__getitem__)
        found[step.core] = matrix_gradient.view(moved).permute(back).to(core.dtype).contiguous()
    return torch.cat(blocks) if of_x else None, [found[k] for k in range(len(cores))]


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
