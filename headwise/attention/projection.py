"""A linear map that is not kept as one matrix: what a kind may have in the place of `nn.Linear`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


class Projection(nn.Module):
    """`x (…, in_features)` to `W x + bias (…, out_features)`, with W made of other parameters.

    `Attention.make_projections` returns two modules, each an `nn.Linear` or a `Projection`. The model
    initialises, counts and exports a projection through what is declared here.

    Attributes:
        in_features, out_features: sizes of W.
        bias: `(out_features,)` or None.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def draw(self, std: float) -> None:
        """Draw the parameters anew, so that W starts as the model's matrices do, as far as it can; bias 0.

        Args:
            std: standard deviation of the entries of a matrix `(out_features, in_features)`.
        """
        raise NotImplementedError

    def rescale(self, factor: float) -> None:
        """Multiply W by a number; the bias stays."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """W, `(out_features, in_features)`: for analysis and export, never in training."""
        raise NotImplementedError

    def products_per_token(self) -> int:
        """Multiply-adds of one token's forward pass."""
        raise NotImplementedError

    def backward_products_per_token(self) -> int:
        """Multiply-adds of its backward pass, with what that computes again; two for each of the forward."""
        return 2 * self.products_per_token()


def projections(module: nn.Module) -> Iterator[tuple[str, Projection]]:
    """The projections in `module` that stand in none of the others, with their names."""
    found: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, Projection) and not any(name.startswith(f"{outer}.") for outer in found if outer):
            found.append(name)
            yield name, part
