"""TT-SVD: the cores of a given tensor, and the tensor of given cores (Oseledets 2011, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Ranks = int | Sequence[int]


def maximal_ranks(sizes: Sequence[int]) -> list[int]:
    """The ranks with which every tensor of these sizes is exact: of each unfolding, its smaller side.

    Args:
        sizes: `(n_1, …, n_d)`; of a matrix, `m_k · n_k`.

    Returns:
        `d - 1` ranks.
    """
    return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]


def tensor_train(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """Cores of a tensor train that is near to `tensor`: exact at the maximal ranks.

    With ε_k the distance of the k-th unfolding `(n_1 … n_k, n_{k+1} … n_d)` from the nearest matrix of rank
    r_k (`truncation_errors`), `‖A - Â‖² <= Σ ε_k²` in the Frobenius norm (Oseledets 2011, theorem 2.2),
    which is at most d - 1 times the least error that these ranks allow.

    Args:
        tensor: `(n_1, …, n_d)`, floating-point, not empty.
        ranks: r_1 to r_{d-1}; one number stands for all, and is lowered where less is maximal.

    Returns:
        d cores, `(r_{k-1}, n_k, r_k)` with `r_0 = r_d = 1`; all but the last have orthonormal columns. A
        rank is lowered without loss where it exceeds `r_{k-1} · n_k`.

    Raises:
        ValueError: a rank below 1 or above the maximum of its place, another number of them, or no tensor.
    """
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise ValueError(f"tensor has shape {tuple(tensor.shape)}; expected at least one entry and one axis")
    sizes = list(tensor.shape)
    chosen = _checked(ranks, maximal_ranks(sizes))
    cores, rest, rank = [], tensor, 1
    for size, following in zip(sizes, chosen, strict=False):
        u, s, v = torch.linalg.svd(rest.reshape(rank * size, -1), full_matrices=False)
        following = min(following, len(s))  # where the rank before is small, fewer are exact
        cores.append(u[:, :following].reshape(rank, size, following))
        rest, rank = s[:following, None] * v[:following], following
    return [*cores, rest.reshape(rank, sizes[-1], 1)]


def truncation_errors(tensor: Tensor, ranks: Ranks) -> Tensor:
    """ε_k: how far each unfolding is from the nearest matrix of rank r_k, in the Frobenius norm; `(d - 1,)`.

    Args, raises: as `tensor_train`.
    """
    sizes = list(tensor.shape)
    found = [
        torch.linalg.svdvals(tensor.reshape(math.prod(sizes[:k]), -1))[rank:].norm()
        for k, rank in enumerate(_checked(ranks, maximal_ranks(sizes)), start=1)
    ]
    return torch.stack(found) if found else tensor.new_zeros(0)


def tensor_train_matrix(
    matrix: Tensor, rows: Sequence[int], columns: Sequence[int], ranks: Ranks
) -> list[Tensor]:
    """Cores of a matrix, with its row and its column index taken apart.

    Args:
        matrix: `(M, N)`; zeros pad it to `(Π rows, Π columns)`.
        rows: m_1 to m_d.
        columns: n_1 to n_d.
        ranks: as in `tensor_train`, of a tensor of sizes `m_k · n_k`.

    Returns:
        d cores `(r_{k-1}, m_k, n_k, r_k)`.

    Raises:
        ValueError: a matrix that is larger than the product of the factors, or as `tensor_train`.
    """
    pad = math.prod(rows) - matrix.shape[0], math.prod(columns) - matrix.shape[1]
    if min(pad) < 0 or len(rows) != len(columns):
        raise ValueError(f"a matrix {tuple(matrix.shape)} does not fit rows {rows} and columns {columns}")
    d = len(rows)
    apart = F.pad(matrix, (0, pad[1], 0, pad[0])).reshape(*rows, *columns)
    pairs = apart.permute([axis for k in range(d) for axis in (k, d + k)])
    sizes = [m * n for m, n in zip(rows, columns, strict=True)]
    cores = tensor_train(pairs.reshape(sizes), ranks)
    return [core.reshape(len(core), m, n, -1) for core, m, n in zip(cores, rows, columns, strict=True)]


def reconstruct(cores: Sequence[Tensor]) -> Tensor:
    """The tensor or the matrix of the cores, in full.

    Args:
        cores: `(r_{k-1}, n_k, r_k)` each, or `(r_{k-1}, m_k, n_k, r_k)` each.

    Returns:
        `(n_1, …, n_d)`, or `(Π m_k, Π n_k)`.

    Raises:
        ValueError: cores of other shapes, or whose ranks do not meet.
    """
    check_cores(cores)
    full = cores[0]
    for core in cores[1:]:
        full = torch.tensordot(full, core, dims=1)
    full = full.squeeze(0).squeeze(-1)
    d = len(cores)
    if cores[0].dim() == 3:
        return full
    rows = math.prod(core.shape[1] for core in cores)
    return full.permute([*range(0, 2 * d, 2), *range(1, 2 * d, 2)]).reshape(rows, -1)


def check_cores(cores: Sequence[Tensor]) -> None:
    """Refuse what is no tensor train.

    Raises:
        ValueError: cores of other shapes, or whose ranks do not meet.
    """
    shapes = [tuple(core.shape) for core in cores]
    ranks = [1, *(shape[0] for shape in shapes[1:]), 1]
    meet = all(
        shape[0] == a and shape[-1] == b for shape, a, b in zip(shapes, ranks, ranks[1:], strict=False)
    )
    if not shapes or {len(shape) for shape in shapes} not in ({3}, {4}) or not meet:
        raise ValueError(
            f"cores have shapes {shapes}; expected (r, n, r') or (r, m, n, r') each, 1 at both ends"
        )


def _checked(ranks: Ranks, maximal: list[int]) -> list[int]:
    chosen = [min(ranks, most) for most in maximal] if isinstance(ranks, int) else list(ranks)
    if len(chosen) != len(maximal):
        raise ValueError(
            f"{len(chosen)} ranks for a tensor of {len(maximal) + 1} axes; expected {len(maximal)}"
        )
    if any(not 1 <= rank <= most for rank, most in zip(chosen, maximal, strict=True)):
        raise ValueError(f"ranks are {chosen}; expected at least 1 each and at most {maximal}")
    return chosen
