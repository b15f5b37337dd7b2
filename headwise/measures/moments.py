"""Means and correlations per head, gathered part by part without keeping tokens.

`gather` turns the tokens of one part into counts, means and centred products; `merge` adds parts
(Chan, Golub & LeVeque 1979) in the order given, so that a resumed profile ends with the same bits.
Spearman's correlation needs ranks over all tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headwise.measures.means import mean_of
from headwise.measures.spec import CORRELATED_WITH, correlated, measure_of

_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Moments:
    """Of M measures over the tokens of R heads, in float64.

    Attributes:
        tokens: tokens per head that the means are over, `(M, R)`.
        mean: mean of each measure over them, `(M, R)`.
        paired: tokens per head that have a context, `()`: from number `ignore_first` on.
        centre: mean over those, `(M, R)`.
        products: Σ (x - mean x)(y - mean y) over those, `(R, M, M)`.
    """

    tokens: np.ndarray
    mean: np.ndarray
    paired: np.ndarray
    centre: np.ndarray
    products: np.ndarray


def gather(values: Tensor, names: Sequence[str], ignore_first: int) -> dict[str, Tensor]:
    """The fields of `Moments` for `values (M, B, R, T)`, on their device, without waiting for it."""
    n_heads = values.shape[2]
    step = max(1, _AT_ONCE // (values.numel() // n_heads))
    blocks = [_gather(values[:, :, low : low + step], names, ignore_first) for low in range(0, n_heads, step)]
    found = {name: torch.cat([b[name] for b in blocks], dim=-1) for name in ("tokens", "mean", "centre")}
    found["products"] = torch.cat([b["products"] for b in blocks])
    paired = values.shape[1] * max(values.shape[3] - ignore_first, 0)
    return found | {"paired": torch.tensor(paired, dtype=torch.float64)}


def _gather(values: Tensor, names: Sequence[str], ignore_first: int) -> dict[str, Tensor]:
    exact = values.double().movedim(1, 2)  # (M, R, B, T)
    mean = exact.mean((2, 3))
    tokens = torch.full_like(mean, exact[0, 0].numel())
    later = exact[..., ignore_first:].flatten(2)
    n = later.shape[-1]
    centre = later.mean(-1) if n else torch.zeros_like(mean)
    off = (later - centre[..., None]).movedim(0, 1)  # (R, M, n)
    for m, measure in enumerate(map(measure_of, names)):
        if measure.absent is not None:
            own = later[m] if measure.needs_context else exact[m].flatten(1)
            tokens[m], mean[m] = mean_of(measure, own)
        elif measure.needs_context:
            tokens[m], mean[m] = n, centre[m]
    return {"tokens": tokens, "mean": mean, "centre": centre, "products": off @ off.mT}


def merge(parts: Sequence[Moments]) -> Moments:
    """The moments of all parts together, added in their order."""
    with np.errstate(invalid="ignore"):  # an infinite value, which marks absence, has no centred product
        return _merge(parts)


def _merge(parts: Sequence[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        tokens = total.tokens + part.tokens
        paired = total.paired + part.paired
        share = part.paired / np.maximum(paired, 1)
        step = part.centre - total.centre
        cross = np.einsum("mr,kr->rmk", step, step) * (total.paired * share)
        total = Moments(
            tokens=tokens,
            mean=_merged(total, part),
            paired=paired,
            centre=total.centre + step * share,
            products=total.products + part.products + cross,
        )
    return total


def _merged(total: Moments, part: Moments) -> np.ndarray:
    """The mean over both; that of one where the other has no token, and so no mean."""
    tokens = total.tokens + part.tokens
    mean = total.mean + (part.mean - total.mean) * part.tokens / np.maximum(tokens, 1)
    mean = np.where(part.tokens == 0, total.mean, mean)
    return np.where((total.tokens == 0) & (part.tokens > 0), part.mean, mean)


def pearson(moments: Moments, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Pearson's correlations of `CORRELATED_WITH`, `(R,)` by measure; NaN where one is constant."""
    found = {}
    for name in correlated(names)[1:]:
        x, y = names.index(CORRELATED_WITH), names.index(name)
        spread = moments.products[:, x, x] * moments.products[:, y, y]
        with np.errstate(invalid="ignore", divide="ignore"):
            found[name] = np.where(spread > 0, moments.products[:, x, y] / np.sqrt(spread), np.nan)
    return found


def spearman(values: Tensor) -> Tensor:
    """Spearman's correlation of the first of M measures with each other one.

    Args:
        values: `(M, R, N)`.

    Returns:
        `(M - 1, R)` float64; ties share the mean of their ranks, NaN where a measure is constant or
        not finite.
    """
    n_heads, n = values.shape[1:]
    step = max(1, _AT_ONCE // max(1, n * len(values)))
    blocks = []
    for low in range(0, n_heads, step):
        block = values[:, low : low + step]
        ranks = _ranks(block)
        ranks -= (n - 1) / 2
        products = (ranks[1:] * ranks[:1]).sum(-1)
        spread = ranks.square().sum(-1)
        known = block.isfinite().all(-1)
        known = known[1:] & known[:1] & (spread[1:] * spread[:1] > 0)
        blocks.append(torch.where(known, products / (spread[1:] * spread[:1]).sqrt(), torch.nan))
    return torch.cat(blocks, dim=-1)


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the last axis from 0, in float64; equal values share the mean of theirs."""
    ordered, order = values.sort(dim=-1)
    n = values.shape[-1]
    place = torch.arange(n, device=values.device).expand_as(order)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    ends = starts.roll(-1, dims=-1)  # a group ends where the next one starts; the last at the end
    first = torch.where(starts, place, 0).cummax(-1).values
    last = torch.where(ends, place, n - 1).flip(-1).cummin(-1).values.flip(-1)
    return torch.empty_like(values, dtype=torch.float64).scatter_(-1, order, (first + last).double() / 2)
