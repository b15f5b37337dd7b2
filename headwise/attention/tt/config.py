"""`model.attention.tt.*`: ranks, factors, and the initialisation of the cores."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.errors import in_range, one_of

SECTION = "model.attention.tt"
INITS = ("random", "svd")
SHARED = ("none", "heads", "qkv")
ENGINES = ("flash", "mha")
USUAL_RANK = 16


@dataclass
class TensorTrainConfig:
    """Options of kind `tt`.

    Attributes:
        rank: the inner ranks of every matrix; 16, or the largest possible, where not given. A place between
            two cores that allows less takes its maximum, which loses nothing; a rank that no place allows is
            refused.
        n_factors: cores of a matrix, and factors of each of its dimensions: 2, 3 or 4.
        init: what the cores start as. `random`: normal, so that the entries of W have the variance of the
            model's init; `svd`: TT-SVD of the very matrix that a dense model with the same seed starts
            from, whose entries are smaller, because most of a random matrix is cut off.
        share_cores: `none`: each of W_Q, W_K, W_V and W_O has its own cores, and its dimensions are split as
            evenly as possible. `heads`: the heads are one factor, so that each head has a slice of its own in
            the first core and the other cores serve all heads of the matrix. `qkv`: W_Q, W_K and W_V share
            those cores too.
        engine: what computes scores and values: `flash` or `mha`, as the kinds of these names do.
    """

    rank: int | None = None
    n_factors: int = 2
    init: str = "random"
    share_cores: str = "none"
    engine: str = "flash"

    def validate_values(self) -> None:
        """Refuse what has no meaning, also where another kind is chosen.

        Raises:
            HeadwiseError: names the key, the value and what is allowed.
        """
        in_range(f"{SECTION}.rank", self.rank, 1, 2**30)
        in_range(f"{SECTION}.n_factors", self.n_factors, 2, 4)
        one_of(f"{SECTION}.init", self.init, INITS)
        one_of(f"{SECTION}.share_cores", self.share_cores, SHARED)
        one_of(f"{SECTION}.engine", self.engine, ENGINES)
