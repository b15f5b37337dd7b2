"""`model.attention.differential`: the version, and the initial value of λ."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.errors import HeadwiseError
from headwise.functional.differential import lambda_start

VERSIONS = (1, 2)


@dataclass
class DifferentialConfig:
    """model.attention.differential.*

    Attributes:
        version: 2 has λ = sigmoid(W_λ x) for each head and token, and two queries of width D a head on shared
            keys. 1 has one λ a layer, queries and keys of D/2, and a norm after each head.
        lambda_init: of version 1, where λ starts; not given, 0.8 - 0.6 exp(-0.3 · layer), layers from 0.
    """

    version: int = 2
    lambda_init: float | None = None

    def validate_values(self) -> None:
        """Refuse what has no meaning, also where another kind is chosen.

        Raises:
            HeadwiseError: a version or a λ that does not exist.
        """
        if self.version not in VERSIONS:
            raise HeadwiseError(f"model.attention.differential.version is {self.version}; choose 1 or 2")
        if self.lambda_init is None:
            return
        if not 0 <= self.lambda_init < 1:
            raise HeadwiseError(
                f"model.attention.differential.lambda_init is {self.lambda_init}; it must be at least 0 and "
                "below 1, since a head's output is multiplied by 1 - lambda_init"
            )
        if self.version != 1:
            raise HeadwiseError(
                f"model.attention.differential.lambda_init is {self.lambda_init}, and version {self.version} "
                "does not take it: its λ is sigmoid(W_λ x); leave it out, or choose version 1"
            )

    def validate(self, *, n_heads: int, head_dim: int) -> None:
        """Refuse heads that cannot be halved.

        Raises:
            HeadwiseError: version 1 with an odd width.
        """
        if self.version == 1 and head_dim % 2:
            raise HeadwiseError(
                f"model.head_dim is {head_dim}, and version 1 of differential attention splits each query "
                "and key into two halves: make it even, or choose version 2"
            )

    def start(self, layer: int) -> float:
        """λ_init of a layer under version 1."""
        return lambda_start(layer) if self.lambda_init is None else self.lambda_init
