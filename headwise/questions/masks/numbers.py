"""What masks do, in numbers: how far back they reach, what they leave, whether they are all or nothing.

Arrays are `(N, T, T)`, entry [n, i, j] of query i and key j: `attack` S and `taken` F, as MECHANISMS
and `headwise.questions.masks.selection` name them. N masks are pooled; pass one to look at it alone.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

NEAR = 8
"""Tokens back that count as local."""

LATER = 32
"""Later queries after which a token's fate is mostly known; the last tokens of a prompt have had few."""

LOW, HIGH = 0.05, 0.95
"""F between these is graded: neither left alone nor wholly taken."""

EDGES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0, 2.0, 5.0, 10.0)
"""Where the bins of F begin; the first also holds what lies below 0, the last is open."""


def numbers(
    attack: np.ndarray, taken: np.ndarray, *, protect_bos: bool = True, adds_up: bool = True
) -> dict[str, Any]:
    """All numbers of N masks together; None for what has no value.

    Args:
        protect_bos: key 0 cannot be masked and is left out of shares of tokens.
        adds_up: F is what attacks did, so that its rise after query i is query i's doing.

    Returns:
        attack, effect: `distances` of S where positive, and of the strength 1 - min(F, 1) that fell.
        tokens: how many could be masked: a later query came, and they are not protected; masked: share
        of them with F >= 1 at the end; seasoned, masked_seasoned: the same for those with at least
        `LATER` later queries. graded: share with F within (LOW, HIGH) at the end; graded_pairs: the same
        over all pairs of query and earlier key. histogram: share of tokens in the bins of `EDGES`.
        median: of F at the end. kept_context: mean M over the mean number of visible keys. given_back:
        negative part of S over its positive part.
    """
    length = taken.shape[-1]
    first = 1 if protect_bos else 0
    final = taken[:, -1, first:-1]
    seasoned = taken[:, -1, first : max(first, length - LATER)]
    i, j = np.tril_indices(length, -1)
    earlier = taken[:, i, j][:, j >= first]
    positive = np.clip(attack, 0, None)
    total = float(positive.sum(dtype=np.float64))
    rise = np.diff(np.clip(taken, 0, 1), axis=1)
    return {
        "attack": distances(positive),
        "effect": distances(np.clip(rise, 0, None)) if adds_up else None,
        "tokens": final.shape[1],
        "masked": _share(final >= 1),
        "seasoned": seasoned.shape[1],
        "masked_seasoned": _share(seasoned >= 1),
        "graded": _share((final > LOW) & (final < HIGH)),
        "graded_pairs": _share((earlier > LOW) & (earlier < HIGH)),
        "histogram": histogram(final),
        "median": float(np.median(final)) if final.size else None,
        "kept_context": kept_share(taken),
        "given_back": float(-np.clip(attack, None, 0).sum(dtype=np.float64)) / total if total else None,
    }


def distances(weight: np.ndarray) -> dict[str, Any] | None:
    """How far back weight lies; None where there is none.

    Args:
        weight: `(N, rows, T)`, >= 0, of query i (the row) on key j <= i.

    Returns:
        total; shares: of the weight at distance i - j = 0, 1, …, `(T,)`; median: the least distance
        within which half of it lies; mean; near: share at most `NEAR` tokens back.
    """
    summed = weight.sum(0, dtype=np.float64)
    total = float(summed.sum())
    if not total:
        return None
    by_distance = np.array([np.trace(summed, -d) for d in range(summed.shape[1])])
    return {"total": total} | _spread(by_distance / total)


def attacked_alike(length: int, *, protect_bos: bool, protect_self: bool) -> dict[str, Any]:
    """`distances` of a model whose queries attack all the keys they may attack alike."""
    by_distance = np.arange(length, 0, -1) - (1.0 if protect_bos else 0.0)
    if protect_self:
        by_distance[0] = 0.0
    return {"total": float(by_distance.sum())} | _spread(by_distance / by_distance.sum())


def histogram(taken: np.ndarray) -> list[float] | None:
    """Share of the values in each bin that begins at one of `EDGES`."""
    if not taken.size:
        return None
    counts = np.histogram(np.clip(taken, 0, None), [*EDGES, np.inf])[0]
    return (counts / taken.size).tolist()


def kept_share(taken: np.ndarray) -> float:
    """Mean over queries of M[i] = Σ_{j<=i} (1 - min(F[i,j], 1)), over the mean number of visible keys."""
    length = taken.shape[-1]
    held = np.tril(1 - np.minimum(taken, 1)).sum((1, 2), dtype=np.float64)
    return float(held.mean() / (length * (length + 1) / 2))


def absorbed(attack: np.ndarray, taken: np.ndarray) -> float | None:
    """Share of the attack before the last query that protection took up; None without an attack."""
    total = float(np.clip(attack[:, :-1], 0, None).sum(dtype=np.float64))
    return 1 - float(taken[:, -1].sum(dtype=np.float64)) / total if total else None


def differences(taken: np.ndarray) -> list[dict[str, Any]]:
    """How much every two of N masks differ in min(F, 1) over pairs of a query and an earlier key.

    Returns:
        masks: their indices; difference: mean of |a - b|; correlation: Pearson's, None where a mask is
        constant.
    """
    i, j = np.tril_indices(taken.shape[-1], -1)
    values = np.clip(taken[:, i, j], 0, 1).astype(np.float64)
    apart = values - values.mean(1, keepdims=True)
    apart[(values == values[:, :1]).all(1)] = 0  # a constant mask has no spread, which rounding would leave
    norm = np.sqrt((apart**2).sum(1))
    return [
        {
            "masks": [a, b],
            "difference": float(np.abs(values[a] - values[b]).mean()),
            "correlation": float(apart[a] @ apart[b] / norm[a] / norm[b]) if norm[a] and norm[b] else None,
        }
        for a, b in combinations(range(len(values)), 2)
    ]


def _spread(shares: np.ndarray) -> dict[str, Any]:
    return {
        "shares": shares.tolist(),
        "median": int(np.searchsorted(shares.cumsum(), 0.5 - 1e-12)),
        "mean": float((np.arange(shares.size) * shares).sum()),
        "near": float(shares[: NEAR + 1].sum()),
    }


def _share(those: np.ndarray) -> float | None:
    return float(those.mean()) if those.size else None
