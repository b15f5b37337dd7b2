"""What the claims of one section come to, by the paired differences of `headwise.analysis.conclusion`.

The interval holds for all claims of the section at once, and for one look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headwise.analysis.conclusion import Conclusion, conclude, smallest_difference
from headwise.analysis.statistics import Summary, paired, summarize


@dataclass(frozen=True)
class Claim:
    """`a` is lower than, higher than or equal to `b` in `measure`; `exploratory`: stated after its runs."""

    a: str
    b: str
    measure: str
    direction: str
    smallest: float | str = 0.0
    exploratory: bool = False


@dataclass(frozen=True)
class Value:
    """One run's value: its seed, why it has none, a fingerprint of all but the seed, its data's checksum."""

    seed: int
    value: float | None
    why: str = ""
    configuration: str = ""
    data: str = ""


@dataclass(frozen=True)
class Decision:
    """A claim, decided: `supported`, `refuted` or `not resolved`, with a - b and its interval."""

    claim: Claim
    decision: str
    why: str
    difference: Summary
    confidence: float
    p: float | None
    seeds: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class NoiseFloor:
    """The spread over the seeds of an unchanged baseline."""

    summary: Summary
    text: str
    notes: tuple[str, ...] = ()


def decide(claims: Sequence[Claim], values: Mapping[tuple[str, str], Sequence[Value]]) -> list[Decision]:
    """Decide the claims of one section together, in their order.

    Args:
        values: (group, measure) -> its runs.
    """
    return [_decide(claim, values, len(claims)) for claim in claims]


def _decide(claim: Claim, values: Mapping[tuple[str, str], Sequence[Value]], comparisons: int) -> Decision:
    runs = [values.get((name, claim.measure), ()) for name in (claim.a, claim.b)]
    first, second = ({run.seed: run.value for run in side if run.value is not None} for side in runs)
    pairs = paired(second, first)
    base = summarize(second[seed] for seed in pairs.seeds).mean
    smallest = smallest_difference(claim.smallest, base) if claim.smallest else 0.0
    data = {run.data for side in runs for run in side if run.data}
    doubt = f"the runs of {claim.a} and {claim.b} used different data" if len(data) > 1 else None
    if doubt is None and min(len(first), len(second)) < 2:
        doubt = f"{claim.a} has {len(first)} and {claim.b} {len(second)} seeds; two or more show their spread"
    found = conclude(
        pairs, smallest if claim.direction == "equal" else 0.0, comparisons, unit="", doubt=doubt
    )
    confidence = 0.95 ** (1 / comparisons)
    notes = tuple(f"{run.why} (seed {run.seed})" for side in runs for run in side if run.why)
    word = "not resolved" if doubt else _word(claim, found, smallest)
    return Decision(
        claim, word, found.why, found.difference, confidence, found.p_adjusted, pairs.seeds, notes
    )


def _word(claim: Claim, found: Conclusion, smallest: float) -> str:
    low, high = found.difference.low, found.difference.high
    if low is None or high is None:
        return "not resolved"
    if claim.direction == "equal":
        if found.conclusion == "equivalent":
            return "supported"
        return "refuted" if low > smallest or high < -smallest else "not resolved"
    if claim.direction == "higher":
        low, high = -high, -low
    if high < -smallest or high == -smallest < 0:
        return "supported"
    return "refuted" if low > -smallest else "not resolved"


def noise_floor(values: Sequence[Value], name: str = "the baseline") -> NoiseFloor:
    """The noise floor of the runs of one unchanged baseline."""
    summary = summarize(
        run.value for run in {run.seed: run for run in values}.values() if run.value is not None
    )
    if summary.std is None:
        return NoiseFloor(summary, f"{name} has {summary.n} seed, which shows no spread; run two or more")
    return NoiseFloor(
        summary,
        f"over {summary.n} seeds of {name}, the standard deviation is {summary.std:.4g} around "
        f"{summary.mean:.4f}",
    )
