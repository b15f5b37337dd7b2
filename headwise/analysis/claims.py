"""Decides the claims of one section of a notebook over seeds: supported, refuted or not resolved.

    claim on d = a - b         supported: the whole interval of d         refuted: the whole interval of d
    lower                      lies below 0                               lies above 0
    lower by at least s        lies at or below -s                        lies above -s
    higher                     the mirror image
    equal within s             lies within ±s                             lies outside of ±s

The differences are paired by seed. The interval is valid at every look (`headwise.analysis.sequential`), so
that one may look after each seed and stop at any time. The claims of a section are corrected by Holm's
step-down procedure (Scandinavian Journal of Statistics 6, 1979): of m claims the one with the smallest
p-value is decided at confidence 1 - 0.05/m, the next at 1 - 0.05/(m - 1), and so on up to the first that is
not decided. A claim counts in m from the time it is stated, with runs or without. The interval shown has the
confidence of the claim's step, so that the interval and the decision always agree. Claims stated beforehand
are corrected among themselves; a claim stated afterwards (exploratory) is corrected with all claims of the
section, so that it never weakens the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from headwise.analysis import further
from headwise.analysis.conclusion import signed, smallest_difference
from headwise.analysis.further import Seeds
from headwise.analysis.noise import NoiseFloor, noise_floor
from headwise.analysis.seeds import Counted, Value, count, fine, summarize_differences
from headwise.analysis.sequential import ERROR_RATE, anytime, half_width, least_seeds, p_value
from headwise.analysis.statistics import Summary, holm, summarize
from headwise.errors import HeadwiseError, one_of

__all__ = ["DIRECTIONS", "Claim", "Decision", "NoiseFloor", "Value", "decide", "noise_floor"]

DIRECTIONS = ("lower", "higher", "equal")
MIRROR = {"lower": "higher", "higher": "lower", "equal": "equal"}


@dataclass(frozen=True)
class Claim:
    """`a` is lower than, higher than or equal to `b` in `measure`.

    Attributes:
        smallest: lower, higher: by at least this much. equal: within this much, which must be above 0. A
            number in the measure's unit, or a share of b's mean such as `0.5%`.
        exploratory: stated after its runs had ended.

    Raises:
        HeadwiseError: an unknown direction, an invalid smallest difference, or a group compared with itself.
    """

    a: str
    b: str
    measure: str
    direction: str
    smallest: float | str = 0.0
    exploratory: bool = False

    def __post_init__(self) -> None:
        one_of("direction", self.direction, DIRECTIONS)
        if self.a == self.b:
            raise HeadwiseError(f"{self.a} is compared with itself; name two runs or groups")
        none = not isinstance(self.smallest, bool | str) and self.smallest == 0
        if self.direction == "equal" and none:
            raise HeadwiseError(
                f"the claim that {self.a} equals {self.b} has no smallest difference, and no interval can "
                "show that two means are exactly equal; add the smallest difference that matters, such as "
                "0.01"
            )
        if not none:
            smallest_difference(self.smallest, None)

    @property
    def question(self) -> tuple[object, ...]:
        """A key that is the same for equivalent claims, such as `a lower than b` and `b higher than a`."""
        share = isinstance(self.smallest, str) and "%" in self.smallest  # of b, which the mirror image lacks
        if self.a < self.b or share:
            return (self.a, self.b, self.measure, self.direction, str(self.smallest))
        return (self.b, self.a, self.measure, MIRROR[self.direction], str(self.smallest))


@dataclass(frozen=True)
class Decision:
    """One claim, decided.

    Attributes:
        decision: `supported`, `refuted` or `not resolved`.
        why: the reason, as a clause with its numbers.
        difference: a - b over the common seeds: n, mean, std, and the half-width at `confidence`, or None if
            there is no interval yet.
        confidence: of the interval, which is valid at every look: that of the claim's step in Holm's
            procedure.
        p: the p-value, valid at every look and corrected by Holm; None if nothing was tested.
        seeds: the seeds counted.
        smallest: the smallest difference as a number, in the measure's unit.
        further_seeds: the range of further seeds that would resolve the claim if the mean difference stayed
            the same; None if the claim is resolved or the range is unknown.
        notes: the omitted runs with the reasons, a clause each.
    """

    claim: Claim
    decision: str
    why: str
    difference: Summary
    confidence: float
    p: float | None
    seeds: tuple[int, ...]
    smallest: float
    further_seeds: Seeds | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Evidence:
    """The evidence on one claim before any correction; `doubt` is the reason why the runs cannot decide
    it."""

    difference: Summary
    seeds: tuple[int, ...]
    smallest: float
    p: float | None
    doubt: str | None
    identical: bool
    notes: tuple[str, ...]


def decide(claims: Sequence[Claim], values: Mapping[tuple[str, str], Sequence[Value]]) -> list[Decision]:
    """Decide the claims of one section together; the answers keep the order of the claims.

    Args:
        claims: all claims of the section; claims without runs also count in the correction. A claim that is
            stated twice counts once.
        values: (run or group, measure) -> its runs.
    """
    evidence = {claim: _evidence(claim, values) for claim in claims}
    planned = {claim.question: claim for claim in claims if not claim.exploratory}
    everything = planned | {claim.question: claim for claim in claims if claim.question not in planned}
    steps = {
        exploratory: _steps({question: evidence[claim].p for question, claim in family.items()})
        for exploratory, family in ((False, planned), (True, everything))
    }
    return [_decision(claim, evidence[claim], *steps[claim.exploratory][claim.question]) for claim in claims]


def _steps(p_values: dict[tuple[object, ...], float | None]) -> dict[tuple[object, ...], tuple[float, float]]:
    """Question -> its p-value corrected by Holm, and the confidence of its step."""
    known = {question: 1.0 if p is None else p for question, p in p_values.items()}
    corrected = dict(zip(known, holm(list(known.values())), strict=True))
    decided = [p for question, p in known.items() if (corrected[question] or 0.0) < ERROR_RATE]

    def left(question: tuple[object, ...]) -> int:
        smaller = (
            (p < known[question] for p in decided) if known[question] in decided else (True,) * len(decided)
        )
        return len(known) - sum(smaller)

    return {q: (float(corrected[q] or 0.0), 1 - ERROR_RATE / left(q)) for q in known}


def _evidence(claim: Claim, values: Mapping[tuple[str, str], Sequence[Value]]) -> _Evidence:
    a, b = (count(values.get((name, claim.measure), ()), name) for name in (claim.a, claim.b))
    seeds = tuple(seed for seed in a.values if seed in b.values)
    differences = [a.values[seed] - b.values[seed] for seed in seeds]
    difference = summarize_differences(differences, [*a.values.values(), *b.values.values()])
    base = summarize(b.values[seed] for seed in seeds).mean
    smallest = 0.0 if claim.smallest == 0 else smallest_difference(claim.smallest, base)
    doubt = a.doubt or b.doubt
    notes = [*a.notes, *b.notes, *_unpaired(claim, a, b)]
    runs = [run for name in (claim.a, claim.b) for run in values.get((name, claim.measure), ())]
    if doubt is None and len({run.data for run in runs if run.data and run.value is not None}) > 1:
        doubt = f"the runs of {claim.a} and {claim.b} used different data"
    identical = len(seeds) > 1 and not any(differences) and all(fine(a.values[seed]) for seed in seeds)
    if doubt is None and not seeds:
        doubt = f"{claim.a} and {claim.b} have no common seed with a value of {claim.measure}"
    if doubt is None and difference.std == 0 and not identical:
        doubt = (
            f"the difference is {signed(difference.mean or 0.0)} on each of {len(seeds)} seeds, so that its "
            "spread is unknown"
        )
    p = None
    if doubt is None and difference.mean is not None and difference.std is not None:
        p = 0.0 if identical else _p(claim.direction, difference, smallest)
    return _Evidence(difference, seeds, smallest, p, doubt, identical, tuple(notes))


def _unpaired(claim: Claim, a: Counted, b: Counted) -> list[str]:
    notes = []
    for name, rival, mine, other in ((claim.a, claim.b, a, b), (claim.b, claim.a, b, a)):
        alone = [str(seed) for seed in mine.values if seed not in other.values]
        if alone and other.values:
            notes.append(
                f"seed{'s' * (len(alone) > 1)} {', '.join(alone)} of {name} omitted: {rival} has no value"
            )
    return notes


def _p(direction: str, difference: Summary, smallest: float) -> float:
    """The smallest error rate at which the claim is supported or refuted."""
    mean, std = difference.mean or 0.0, difference.std or 0.0
    if direction == "equal":
        return p_value(abs(mean) - smallest, std, difference.n)
    edge = smallest if direction == "higher" else -smallest
    return p_value(mean - edge, std, difference.n)


def _word(direction: str, low: float, high: float, smallest: float) -> str:
    if direction == "higher":
        low, high, direction = -high, -low, "lower"
    if direction == "equal":
        if -smallest <= low and high <= smallest:
            return "supported"
        return "refuted" if low > smallest or high < -smallest else "not resolved"
    if high < -smallest or (high == -smallest < 0):
        return "supported"
    return "refuted" if low > -smallest or (low == smallest == 0) else "not resolved"


def _decision(claim: Claim, found: _Evidence, p: float, confidence: float) -> Decision:
    def result(word: str, why: str, seeds: Seeds | None = None) -> Decision:
        return Decision(
            claim, word, why, shown, confidence, None if found.p is None else p, found.seeds, found.smallest,
            seeds, found.notes,
        )  # fmt: skip

    shown = anytime(found.difference, confidence)
    if found.identical and found.doubt is None:
        shown = replace(found.difference, ci95=0.0)
        word = _word(claim.direction, 0.0, 0.0, found.smallest)
        return result(word, f"both groups gave exactly the same value on each of {shown.n} seeds")
    if found.doubt is not None:
        return result("not resolved", found.doubt)
    low, high, mean = shown.low, shown.high, shown.mean
    if low is None or high is None or mean is None:
        least = least_seeds(confidence)
        why = (
            f"{shown.n} common seed{'s' * (shown.n != 1)}; a {confidence:.1%} interval that is valid at "
            f"every look needs {least}"
        )
        return result("not resolved", why, _further(claim, found, confidence))
    word = _word(claim.direction, low, high, found.smallest)
    if word != "not resolved":
        return result(word, _settled(claim.direction, low, high, found.smallest))
    why = f"the interval [{signed(low)}, {signed(high)}] neither supports nor refutes the claim"
    seeds = _further(claim, found, confidence)
    if seeds is not None:
        why += f"; at the same mean difference, {further.in_words(seeds)} would resolve it"
    return result(word, why, seeds)


def _further(claim: Claim, found: _Evidence, confidence: float) -> Seeds | None:
    mean = found.difference.mean
    if mean is None:
        return None

    def decided(std: float, total: int) -> bool:
        half = half_width(std, total, confidence)
        if half is None:
            return False
        return _word(claim.direction, mean - half, mean + half, found.smallest) != "not resolved"

    return further.further_seeds(found.difference, decided)


def _settled(direction: str, low: float, high: float, smallest: float) -> str:
    interval = f"the whole interval [{signed(low)}, {signed(high)}] lies"
    if direction == "equal":
        inside = "within" if -smallest <= low and high <= smallest else "outside of"
        return f"{interval} {inside} ±{signed(smallest)[1:]}"
    edge = smallest if direction == "higher" else -smallest
    return f"{interval} {'below' if high <= edge else 'above'} {signed(edge) if edge else '0'}"
