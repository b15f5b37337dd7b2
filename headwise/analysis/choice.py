"""Choosing the best of several: whether it is separated from the others beyond the noise of seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from headwise.analysis.statistics import paired, simultaneous, t_quantile

LOWEST, HIGHEST = "lowest", "highest"


@dataclass(frozen=True)
class Separation:
    """Whether the best is separated from each of the others.

    Attributes:
        close: the others that are not separated, the nearest first.
        doubt: why the choice may be noise, a clause; None where it is separated from all.
    """

    close: tuple[str, ...]
    doubt: str | None


def separation(best: str, values: Mapping[str, Mapping[int, float]]) -> Separation:
    """Compare the best with each of the others seed by seed, at 95% over all of them at once (max-t).

    Args:
        best: one of the names.
        values: name -> seed -> value.
    """
    others = [name for name in values if name != best]
    if not others:
        return Separation((), None)
    found = {}
    for name in others:
        difference = paired(values[best], values[name]).difference
        found[name] = simultaneous(difference, len(others))
    close = [
        name for name, one in found.items() if one.low is None or one.high is None or one.low <= 0 <= one.high
    ]
    close.sort(key=lambda name: abs(found[name].mean or 0.0))
    if not close:
        return Separation((), None)
    listed = ", ".join(
        _against(name, found[name].mean, found[name].ci95, found[name].n) for name in close[:3]
    )
    more = f" and {len(close) - 3} more" if len(close) > 3 else ""
    return Separation(
        tuple(close), f"the choice is within the noise of seeds: {best} is not separated from {listed}{more}"
    )


def _against(name: str, mean: float | None, ci95: float | None, n: int) -> str:
    if mean is None:
        return f"{name} (no seed in common)"
    if ci95 is None:
        return f"{name} (difference {mean:+.4g}, one seed in common, which shows no noise)"
    return f"{name} (difference {mean:+.4g} [{mean - ci95:+.4g}, {mean + ci95:+.4g}], {n} seeds)"


def noise_of_trials(confirmed: Sequence[float], seeds: int) -> float | None:
    """The difference of two trials, each the mean over `seeds` seeds, that 95% of pure noise stays below.

    From the spread of one setting over other seeds, as if the two trials had no seed in common. None for
    fewer than two values.
    """
    n = len(confirmed)
    if n < 2:
        return None
    mean = sum(confirmed) / n
    std = math.sqrt(sum((value - mean) ** 2 for value in confirmed) / (n - 1))
    return t_quantile(n) * std * math.sqrt(2 / seeds)


class Bracket(Enum):
    """Where the best of the tried values of a key lies among them."""

    INSIDE = "inside"
    BELOW = "below"
    ABOVE = "above"


def bracket(tried: Sequence[Any], best: Any) -> Bracket:
    """Whether values were tried on both sides of the best one; else the side on which none was.

    A list with fewer than three different numbers has no sides, and neither have words.
    """
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in tried):
        return Bracket.INSIDE
    if len(set(tried)) < 3 or min(tried) < best < max(tried):
        return Bracket.INSIDE
    return Bracket.BELOW if best == min(tried) else Bracket.ABOVE
