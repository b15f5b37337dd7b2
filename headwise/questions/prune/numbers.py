"""The numbers of `prune.json` that follow from losses and measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from headwise.analysis.association import spearman
from headwise.analysis.statistics import Summary, holm, summarize
from headwise.errors import HeadwiseError
from headwise.questions.prune.heads import IMPORTANCE, Heads

LARGEST = 700.0
"""Loss whose perplexity is still a number."""


def laws(known: Mapping[str, Heads], importance: Heads, by: str, seed: int) -> list[dict[str, Any]]:
    """The rank correlation of every measure at hand with importance over the heads, `by` first.

    A recorded importance is held against it only where heads were ranked by it. p-values are Holm's over all
    rows, beside their own.
    """
    names = [name for name in known if name not in (by, IMPORTANCE)]
    names = [by, *names] if by in known else names
    found = []
    for name in names:
        values = [known[name].get(at, math.nan) for at in importance]
        found.append((name, spearman(values, list(importance.values()), seed=seed)))
    corrected = holm([one.p for _, one in found])
    return [
        {"measure": name} | asdict(one) | {"p_holm": p}
        for (name, one), p in zip(found, corrected, strict=True)
    ]


def paired(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Losses in nats, their paired difference over sequences, and perplexities.

    Raises:
        HeadwiseError: a loss is not finite.
    """
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise HeadwiseError("a loss is not finite, so the heads cannot be compared; check the model")
    return {
        "before": float(before.mean()), "after": float(after.mean()),
        "delta": summary(summarize(after - before)),
        "perplexity_before": math.exp(min(before.mean(), LARGEST)),
        "perplexity_after": math.exp(min(after.mean(), LARGEST)),
    }  # fmt: skip


def against_random(
    before: np.ndarray, after: np.ndarray, drawn: Sequence[np.ndarray], mode: str
) -> dict[str, Any] | None:
    """The difference to the random removals, over draws and over sequences; None without a control.

    The verdict is better or worse where both intervals exclude 0 on the same side, undecided otherwise, and
    control where the removal is a random one itself.

    Args:
        before, after: losses by sequence.
        drawn: the losses of each random removal.
    """
    if not drawn:
        return None
    over_draws = summarize(float(after.mean() - one.mean()) for one in drawn)
    over_sequences = summarize(after - np.mean(drawn, axis=0))
    both = (over_draws, over_sequences)
    verdict = "undecided"
    if mode == "random":
        verdict = "control"
    elif all(one.high is not None and one.high < 0 for one in both):
        verdict = "better"
    elif all(one.low is not None and one.low > 0 for one in both):
        verdict = "worse"
    return {
        "delta": summary(summarize(float((one - before).mean()) for one in drawn)),
        "over_draws": summary(over_draws), "over_sequences": summary(over_sequences),
        "costs_less_than": sum(float(one.mean()) > float(after.mean()) for one in drawn), "verdict": verdict,
    }  # fmt: skip


def summary(found: Summary) -> dict[str, Any]:
    """A mean and half of its 95% interval."""
    return {"mean": found.mean, "ci95": found.ci95, "n": found.n}
