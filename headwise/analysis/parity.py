"""The point of parity: the smallest share of the context at which a model is as good as a baseline.

Per seed, the loss as a function of the share is interpolated linearly in the logarithm of the share.
Shares are averaged over seeds in the logarithm, with Student's interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from headwise.analysis.statistics import summarize


@dataclass(frozen=True)
class Parity:
    """Where the loss of a variant reaches that of a baseline with its full context.

    Attributes:
        share: of the context, the geometric mean over seeds; None where a seed never reaches it.
        low, high: the 95% interval of the share; None where there is none.
        seeds: seeds that were compared.
        reached: those of them with a point of parity.
        at_most: a seed is as good already at the smallest share measured, so parity may lie below.
        excess: mean difference of the losses with the full context, in nats; None where not measured.
    """

    share: float | None
    low: float | None
    high: float | None
    seeds: int
    reached: int
    at_most: bool
    excess: float | None

    def text(self, baseline: str, smallest: float) -> str:
        """One sentence; `smallest` is the smallest share that was measured."""
        if not self.seeds:
            return f"no parity with {baseline} can be named: they have no seed in common"
        if not self.reached:
            more = "" if self.excess is None else f"; with the full context it is {self.excess:+.4f} nats off"
            return f"no parity with {baseline} at any budget measured{more}"
        if self.share is None:
            return f"parity with {baseline} in {self.reached} of {self.seeds} seeds only, so none is named"
        if self.at_most:
            return (
                f"parity with {baseline} at {self.share:.3g} of the context or less "
                f"(at least {1 / self.share:.1f}x less memory; {smallest:g} is the smallest budget measured)"
            )
        if self.low is None or self.high is None:
            interval = "one seed, no interval"
        else:
            interval = f"95% interval {1 / self.high:.1f}x–{1 / self.low:.1f}x"
        return (
            f"parity with {baseline} at {self.share:.2g} of the context "
            f"({1 / self.share:.1f}x less memory; {interval})"
        )


def crossing(losses: Mapping[float, float], reference: float) -> float | None:
    """The smallest share whose loss is at most `reference`, between the shares measured; None if none.

    Args:
        losses: share -> loss.
    """
    shares = sorted(losses)
    for position, share in enumerate(shares):
        if losses[share] > reference:
            continue
        if position == 0:
            return share
        below = shares[position - 1]
        rest = (losses[below] - reference) / (losses[below] - losses[share])
        return math.exp(math.log(below) + rest * (math.log(share) - math.log(below)))
    return None


def parity(curves: Mapping[int, Mapping[float, float]], references: Mapping[int, float]) -> Parity:
    """Compare seed by seed, on the seeds that both have.

    Args:
        curves: seed -> share -> loss of the variant.
        references: seed -> loss of the baseline with its full context.
    """
    seeds = sorted(set(curves) & set(references))
    found = {seed: crossing(curves[seed], references[seed]) for seed in seeds}
    points = {seed: share for seed, share in found.items() if share is not None}
    full = [curves[seed][1.0] - references[seed] for seed in seeds if 1.0 in curves[seed]]
    excess = sum(full) / len(full) if full and len(full) == len(seeds) else None
    at_most = any(share == min(curves[seed]) for seed, share in points.items())
    if not points or len(points) < len(seeds):
        return Parity(None, None, None, len(seeds), len(points), at_most, excess)
    mean = summarize(math.log(share) for share in points.values())
    assert mean.mean is not None
    low, high = (None, None) if at_most else (mean.low, mean.high)
    return Parity(
        math.exp(mean.mean),
        None if low is None else math.exp(low),
        None if high is None else math.exp(high),
        len(seeds),
        len(points),
        at_most,
        excess,
    )
