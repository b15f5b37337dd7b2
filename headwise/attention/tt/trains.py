"""The matrices of a layer as tensor trains: their sizes, and the modules that multiply by them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headwise.attention.base import AttentionShape
from headwise.attention.projection import Projection
from headwise.attention.tt.config import SECTION, USUAL_RANK, TensorTrainConfig
from headwise.errors import HeadwiseError
from headwise.functional.tensor_train import (
    backward_products,
    even_factors,
    exact_factors,
    maximal_ranks,
    plan,
    reconstruct,
    tensor_train_linear,
    tensor_train_matrix,
)

Factors = tuple[int, ...]


class Sizes(NamedTuple):
    """A matrix `(out_features, in_features)` in tensor-train form: m_k, n_k and the inner ranks."""

    out_features: int
    in_features: int
    rows: Factors
    columns: Factors
    ranks: Factors

    @property
    def parameters(self) -> int:
        """Numbers in all cores."""
        return sum(math.prod(shape) for shape in self.cores())

    def cores(self) -> Iterator[tuple[int, int, int, int]]:
        """The shape of each core."""
        ranks = (1, *self.ranks, 1)
        yield from zip(ranks, self.rows, self.columns, ranks[1:], strict=False)

    def maximal(self) -> list[int]:
        """The ranks with which every matrix of this size is exact."""
        return maximal_ranks([m * n for m, n in zip(self.rows, self.columns, strict=True)])


class LayerSizes(NamedTuple):
    """The matrices of one layer; `qkv` has three, or one for all where they share cores."""

    qkv: tuple[Sizes, ...]
    out: Sizes

    def all(self) -> tuple[Sizes, ...]:
        """Every matrix."""
        return (*self.qkv, self.out)


def layer_sizes(shape: AttentionShape, options: TensorTrainConfig) -> LayerSizes:
    """The tensor trains of a layer.

    Raises:
        HeadwiseError: a dimension that cannot be factored as asked, or a rank above the maximum.
    """
    d, width, rank = options.n_factors, shape.head_dim, options.rank or USUAL_RANK
    model = _factors("model.d_model", shape.d_model, d)
    heads, kv_heads = shape.n_heads, shape.n_kv_heads
    if options.share_cores == "none":
        of_heads = [_factors("the width of all heads", n * width, d) for n in (heads, kv_heads, kv_heads)]
        qkv = [
            _arranged(n * width, shape.d_model, rows, model, rank)
            for n, rows in zip((heads, kv_heads, kv_heads), of_heads, strict=True)
        ]
        out = _arranged(shape.d_model, heads * width, model, of_heads[0], rank)
    else:
        own = exact_factors(width, d - 1)
        if own is None:
            raise HeadwiseError(
                f"model.head_dim is {width}, which is not a product of {d - 1} factors; "
                f"set {SECTION}.n_factors=2, or {SECTION}.share_cores=none, which pads"
            )
        together = [heads + 2 * kv_heads] if options.share_cores == "qkv" else [heads, kv_heads, kv_heads]
        qkv = [_arranged(n * width, shape.d_model, (n, *own), model, rank, fixed="rows") for n in together]
        out = _arranged(shape.d_model, heads * width, model, (heads, *own), rank, fixed="columns")
    sizes = LayerSizes(tuple(qkv), out)
    most = max(largest for matrix in sizes.all() for largest in matrix.maximal())
    if options.rank is not None and options.rank > most:
        raise HeadwiseError(
            f"{SECTION}.rank is {options.rank}, but the matrices of this layer allow at most {most}: W_Q is "
            f"{heads * width} x {shape.d_model}, in factors {qkv[0].rows} x {qkv[0].columns}"
        )
    return sizes


def _factors(what: str, size: int, d: int) -> Factors:
    if size < 2**d:
        raise HeadwiseError(
            f"{what} is {size}, which is too small for {d} factors of at least 2; lower {SECTION}.n_factors"
        )
    return even_factors(size, d)


def _arranged(
    out_features: int, in_features: int, rows: Factors, columns: Factors, rank: int, *, fixed: str = ""
) -> Sizes:
    """The order of factors that allows the rank at the least cost; of several, with the fewest parameters.

    Args:
        fixed: `rows` or `columns` whose first factor, the heads, stays first.
    """
    candidates = []
    for m, n in itertools.product(_orders(rows, fixed == "rows"), _orders(columns, fixed == "columns")):
        maximal = maximal_ranks([a * b for a, b in zip(m, n, strict=True)])
        sizes = Sizes(out_features, in_features, m, n, tuple(min(rank, most) for most in maximal))
        cost = plan(m, n, sizes.ranks).products
        candidates.append((-math.prod(sizes.ranks), cost, sizes.parameters, sizes))
    return min(candidates)[-1]


def _orders(factors: Factors, first_stays: bool) -> list[Factors]:
    first, rest = (factors[:1], factors[1:]) if first_stays else ((), factors)
    return sorted({(*first, *order) for order in itertools.permutations(rest)})


class TensorTrainProjection(Projection):
    """One or more matrices of the same input, side by side: `y = (W_1 x, W_2 x, …) + bias`.

    Made with random cores; a model draws them as `init` says.

    Args:
        matrices: their sizes.
        init: `random` or `svd`.
        bias: whether there is one.
    """

    def __init__(self, matrices: Sequence[Sizes], init: str, *, bias: bool) -> None:
        super().__init__()
        self.matrices, self.init = tuple(matrices), init
        self.in_features = matrices[0].in_features
        self.out_features = sum(sizes.out_features for sizes in matrices)
        self.trains = nn.ModuleList(
            nn.ParameterList(torch.empty(shape) for shape in sizes.cores()) for sizes in matrices
        )
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None
        # takes the random numbers that it would take here, and gives the spread
        nn.Linear(self.in_features, self.out_features, bias=bias)
        self._draw_random((3 * self.in_features) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`(…, in_features)` to `(…, out_features)`; under autocast in its dtype."""
        trains: list[list[Tensor]] = [list(train.parameters()) for train in self.trains]
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            # x once for all matrices, so that the backward pass keeps one copy
            dtype = torch.get_autocast_dtype(device)
            x, trains = x.to(dtype), [[core.to(dtype) for core in cores] for cores in trains]
        parts = [
            tensor_train_linear(x, cores, sizes.out_features)
            for cores, sizes in zip(trains, self.matrices, strict=True)
        ]
        y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """Draw the cores, by `init`; see `TensorTrainConfig.init`.

        Takes as many random numbers as a dense projection, so that one seed gives the same model around it.
        """
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.init == "random":
            self._draw_random(std)
        like = next(self.parameters())
        whole = torch.empty(self.out_features, self.in_features, dtype=like.dtype, device=like.device)
        nn.init.normal_(whole, std=std)
        if self.init == "svd" and not whole.is_meta:
            self._decompose(whole)

    def _decompose(self, whole: Tensor) -> None:
        parts = whole.split([sizes.out_features for sizes in self.matrices])
        for part, train, sizes in zip(parts, self.trains, self.matrices, strict=True):
            cores = tensor_train_matrix(part, sizes.rows, sizes.columns, sizes.ranks)
            spread = [core.square().mean().sqrt() for core in cores]
            middle = math.prod(float(one) for one in spread) ** (1 / len(cores))
            for parameter, core, one in zip(train.parameters(), cores, spread, strict=True):
                # the numbers of all cores of one size: the optimizer's step is the same for each
                parameter.copy_(core * (middle / one))

    @torch.no_grad()
    def _draw_random(self, std: float) -> None:
        with torch.random.fork_rng(devices=[]):
            for train, sizes in zip(self.trains, self.matrices, strict=True):
                # an entry of W is a sum over all Π r_k paths through the ranks, each a product of d numbers
                spread = (std**2 / math.prod(sizes.ranks)) ** (1 / (2 * len(sizes.rows)))
                for parameter in train.parameters():
                    nn.init.normal_(parameter, std=spread)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """All cores alike, so that the numbers of each stay of one size."""
        for train in self.trains:
            parameters = list(train.parameters())
            for parameter in parameters:
                parameter.mul_(factor ** (1 / len(parameters)))

    @torch.no_grad()
    def dense(self) -> Tensor:
        """All matrices, one below the other."""
        return torch.cat(
            [
                reconstruct(list(train.parameters()))[: sizes.out_features, : sizes.in_features]
                for train, sizes in zip(self.trains, self.matrices, strict=True)
            ]
        )

    def products_per_token(self) -> int:
        """Of the cheapest orders."""
        return sum(plan(s.rows, s.columns, s.ranks).products for s in self.matrices)

    def backward_products_per_token(self) -> int:
        """With the forward pass, which is computed again."""
        plans = (plan(s.rows, s.columns, s.ranks) for s in self.matrices)
        return sum(backward_products(chosen) for chosen in plans)

    def extra_repr(self) -> str:
        """Factors and ranks of each matrix."""
        return ", ".join(f"{s.rows} x {s.columns} rank {s.ranks}" for s in self.matrices)
