"""What the claims of one section of a notebook amount to over seeds: supported, refuted or not resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headwise.analysis.statistics import Summary

DIRECTIONS = ("lower", "higher", "equal")


@dataclass(frozen=True)
class Claim:
    """`a` is lower than, higher than or equal to `b` in `measure`.

    Attributes:
        smallest: lower, higher: by at least this much. equal: within this much, which must be above 0. A number
            in the measure's unit, or a share of b's mean such as `0.5%`.
        exploratory: stated after its runs had ended.
    """

    a: str
    b: str
    measure: str
    direction: str
    smallest: float | str = 0.0
    exploratory: bool = False


@dataclass(frozen=True)
class Value:
    """One run's value of a measure.

    Attributes:
        seed: of the run.
        value: None where the run has none: failed, say.
        why: for None, why, as a clause ("diverged", "failed").
        configuration: a fingerprint of all but the seed; runs of one seed and one configuration are one seed.
    """

    seed: int
    value: float | None
    why: str = ""
    configuration: str = ""


@dataclass(frozen=True)
class Decision:
    """One claim, decided.

    Attributes:
        decision: `supported`, `refuted` or `not resolved`.
        why: the reason, as a clause with its numbers.
        difference: a - b over the seeds that both have: n, mean, std, half-width at `confidence`.
        confidence: of the interval: the level of the claim's step in Holm's correction, valid at every look.
        p: the anytime-valid p-value of the decision, corrected by Holm; None below the least number of seeds.
        seeds: the seeds counted.
        further_seeds: (low, high) seeds beyond these that would resolve it if the mean stayed as it is and the
            spread lies in its interval; `high` None: more than can be told; None: nothing can be told.
        notes: what the reader must know: seeds without a pair, failed runs, repeated runs, faults.
    """

    claim: Claim
    decision: str
    why: str
    difference: Summary
    confidence: float
    p: float | None
    seeds: tuple[int, ...]
    further_seeds: tuple[int, int | None] | None
    notes: tuple[str, ...]


def decide(
    claims: Sequence[Claim], values: Mapping[tuple[str, str], Sequence[Value]]
) -> list[Decision]:
    """Decide the claims of one section together, in their order.

    Args:
        claims: all claims that the section states, those without runs too: they count in the correction.
        values: (name of a run or group, measure) -> its runs.
    """
    raise NotImplementedError


@dataclass(frozen=True)
class NoiseFloor:
    """The spread over seeds of an unchanged baseline.

    Attributes:
        summary: n, mean, std, half-width of the mean.
        std_low, std_high: the 95% chi-square interval of the standard deviation; None below 2 seeds.
        detectable: n -> the difference that n pairs of seeds would resolve, (low, at the spread seen, high).
        text: one sentence.
    """

    summary: Summary
    std_low: float | None
    std_high: float | None
    detectable: dict[int, tuple[float, float, float]]
    text: str
    notes: tuple[str, ...]


def noise_floor(values: Sequence[Value]) -> NoiseFloor:
    """The noise floor of the runs of one unchanged baseline."""
    raise NotImplementedError
