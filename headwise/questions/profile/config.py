"""What decides the table of a profile."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from headwise.errors import HeadwiseError, one_of
from headwise.measures.collector import IGNORE_FIRST, SCORES, ScoresFrom
from headwise.measures.spec import wanted_measures

TABLE_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class ProfileConfig:
    """What decides the table.

    Attributes:
        n_samples, context_length, seed: see `open_samples`.
        scores: logits from q, k before the rotation (query-scaling study, docs/sources.md) or after it.
        measures: columns of the head table; all that there are.
        aggregate: one row per (sample, layer, head) with means over its tokens, not one per token.
        ignore_first: tokens at the start of a context without measures that need one, and left out
            of correlations.
        table_dtype: of the measures on disk, float32 or float16.
        raw_layers: layers whose q, k, v are kept too.
        samples_per_part: contexts per part of the table.
    """

    n_samples: int = 64
    context_length: int = 512
    seed: int | None = None
    scores: ScoresFrom = "pre_rope"
    measures: tuple[str, ...] = field(default_factory=lambda: wanted_measures(None))
    aggregate: bool = False
    ignore_first: int = IGNORE_FIRST
    table_dtype: str = "float32"
    raw_layers: tuple[int, ...] = ()
    samples_per_part: int = 4

    def validate(self) -> None:
        """Refuse what cannot be profiled.

        Raises:
            HeadwiseError: an unknown name, or a number out of range.
        """
        one_of("--scores", self.scores, SCORES)
        one_of("--table-dtype", self.table_dtype, TABLE_DTYPES)
        wanted_measures(self.measures)
        for name, least in (("n_samples", 1), ("context_length", 2), ("samples_per_part", 1)):
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise HeadwiseError(f"{flag} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.ignore_first < self.context_length:
            raise HeadwiseError(
                f"--ignore-first is {self.ignore_first}; it must be at least 0 and below "
                f"--context-length {self.context_length}"
            )
