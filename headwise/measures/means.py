"""Means over tokens by the rules of each measure: which tokens count, and which have no value."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headwise.measures.spec import Measure, measure_of


def mean_of(measure: Measure, values: Tensor) -> tuple[Tensor, Tensor]:
    """How many of `values (..., N)` are the measure's, and their mean, each `(...)`; NaN where none is.

    Tokens without context are not among `values`, where the measure needs one.
    """
    if measure.absent is None:
        mean = values.mean(-1)
        return torch.full_like(mean, values.shape[-1]), mean
    has = measure.has_value(values)
    count = has.sum(-1)
    return count, torch.where(has, values, 0).sum(-1) / count


def counted(values: Mapping[str, Tensor], with_context: Tensor, real: Tensor | None) -> Tensor:
    """Which tokens count towards the mean of each of M measures, `(M, B, H, T)`.

    Args:
        values: `(B, H, T)` by measure.
        with_context: `(B or 1, 1, T)`, True at tokens that see enough keys for measures that need a context.
        real: `(B, T)`, False at padding; None = all are real.
    """
    rows = []
    for name, value in values.items():
        measure = measure_of(name)
        row = torch.ones_like(value, dtype=torch.bool)
        if measure.needs_context:
            row &= with_context
        if measure.absent is not None:
            row &= measure.has_value(value)
        rows.append(row)
    found = torch.stack(rows)
    return found if real is None else found & real[:, None]


def without_early(values: Mapping[str, Tensor], with_context: Tensor) -> dict[str, Tensor]:
    """`values (B, H, T)` with NaN where a measure that needs a context has none."""
    return {
        name: value.masked_fill(~with_context, torch.nan) if measure_of(name).needs_context else value
        for name, value in values.items()
    }
