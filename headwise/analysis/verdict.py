"""GO, NO-GO or INCONCLUSIVE for one attention kind against `flash` (document 003, milestone M6).

GO if any of three rules holds: less memory, longer sequences, or a better entropy signal, each
with validation loss within +5% of flash. NO-GO if none does, or if training is unstable. A rule
whose 95% interval spans its threshold is undecided, and an undecided rule that could still turn
the verdict makes it INCONCLUSIVE.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headwise.analysis.statistics import Summary

LOSS_MARGIN = 0.05
MEMORY_SAVING = 0.20
LENGTH_FACTOR = 2.0
MEMORY_TOLERANCE = 0.01  # "the same memory": allocators round
SIGNIFICANCE = 0.05
NONFINITE_SHARE = 0.001
SPIKE_SHARE = 0.01


@dataclass(frozen=True)
class Evidence:
    """Plain numbers about one kind, relative to flash on the same seeds. None = not measured.

    Attributes:
        loss: relative difference of the validation loss (0.05 = 5% above flash).
        memory: relative difference of the peak device memory (-0.2 = 20% below flash).
        length_factor: sequence length over flash's.
        entropy_r, entropy_p: correlation of head entropy with head importance, and its
            corrected p; `flash_entropy_p` is the same test for flash.
        learned: False where the kind or flash stayed at chance, or where it was before training.
        nonfinite_share, spike_share: shares of steps, over all runs that trained.
        diverged: runs that stopped as diverged, of `started`.
    """

    loss: Summary
    memory: Summary | None = None
    on_cpu: bool = False
    length_factor: float | None = None
    entropy_r: float | None = None
    entropy_p: float | None = None
    flash_entropy_p: float | None = None
    learned: bool = True
    nonfinite_share: float | None = None
    spike_share: float | None = None
    diverged: int = 0
    started: int = 0


@dataclass(frozen=True)
class Rule:
    """One rule's outcome: `holds` is True, False, or None where the interval leaves it open."""

    name: str
    holds: bool | None
    text: str
    evaluated: bool = True


@dataclass(frozen=True)
class Verdict:
    """The verdict, the rule that decided it, and every rule with its numbers."""

    verdict: str
    decided_by: str
    text: str
    rules: list[Rule] = field(default_factory=list)


def judge(evidence: Evidence) -> Verdict:
    """Draw the verdict on one kind from its evidence against flash."""
    stability = stability_rule(evidence)
    quality = quality_rule(evidence)
    ways = [memory_rule(evidence), length_rule(evidence), entropy_rule(evidence)]
    rules = [stability, quality, *ways]

    def verdict(word: str, by: Rule, text: str) -> Verdict:
        return Verdict(word, by.name, text, rules)

    if stability.holds is False:
        return verdict("NO-GO", stability, f"training is unstable: {stability.text}")
    if not evidence.learned:
        return verdict("INCONCLUSIVE", quality, quality.text)
    if quality.holds is False:
        return verdict("NO-GO", quality, f"every rule needs the loss within +5%: {quality.text}")

    def both(way: Rule) -> bool | None:
        if not way.evaluated or way.holds is False:
            return False
        return True if way.holds and quality.holds else None

    outcome = {way.name: both(way) for way in ways}
    for way in ways:
        if outcome[way.name]:
            return verdict("GO", way, f"{way.text}; {quality.text}")
    for way in ways:
        if outcome[way.name] is None:
            return verdict("INCONCLUSIVE", way, f"{way.text}; {quality.text}")
    missing = "; ".join(way.text for way in ways if not way.evaluated)
    if not any(way.evaluated for way in ways):
        return verdict("INCONCLUSIVE", quality, f"{quality.text}, but {missing}")
    failed = "; ".join(way.text for way in ways if way.evaluated)
    return verdict(
        "NO-GO",
        next(way for way in ways if way.evaluated),
        f"no rule holds: {failed}; {quality.text}" + (f" ({missing})" if missing else ""),
    )


def stability_rule(evidence: Evidence) -> Rule:
    """Unstable: over 0.1% of steps not finite, over 1% gradient spikes, or a diverged run."""
    troubles = []
    if evidence.diverged:
        troubles.append(f"{evidence.diverged} of {evidence.started} runs diverged")
    shares = [
        (evidence.nonfinite_share, NONFINITE_SHARE, "steps with non-finite values"),
        (evidence.spike_share, SPIKE_SHARE, "steps with gradient spikes"),
    ]
    known = [(share, limit, what) for share, limit, what in shares if share is not None]
    troubles += [f"{share:.2%} {what} (limit {limit:.1%})" for share, limit, what in known if share > limit]
    if troubles:
        return Rule("stability", False, "; ".join(troubles))
    if not known:
        return Rule("stability", True, "not recorded", evaluated=False)
    calm = ", ".join(f"{share:.2%} {what} (limit {limit:.1%})" for share, limit, what in known)
    return Rule("stability", True, calm)


def quality_rule(evidence: Evidence) -> Rule:
    """Validation loss within +5% of flash."""
    if not evidence.learned:
        return Rule("loss", None, "nothing was learned, so losses say nothing")
    holds = _below(evidence.loss, LOSS_MARGIN)
    return Rule("loss", holds, f"validation loss {_percent(evidence.loss)} against flash (limit +5%)")


def memory_rule(evidence: Evidence) -> Rule:
    """At least 20% lower peak memory than flash; not evaluated on CPU."""
    if evidence.on_cpu:
        return Rule("memory", None, "memory rules are not evaluated on CPU", evaluated=False)
    if evidence.memory is None or evidence.memory.n == 0:
        return Rule("memory", None, "peak memory was not measured", evaluated=False)
    holds = _below(evidence.memory, -MEMORY_SAVING)
    return Rule("memory", holds, f"peak memory {_percent(evidence.memory)} (needs -20%)")


def length_rule(evidence: Evidence) -> Rule:
    """At least twice the sequence length in the same memory; not evaluated on CPU."""
    if evidence.on_cpu:
        return Rule("length", None, "length at equal memory is not evaluated on CPU", False)
    factor, memory = evidence.length_factor, evidence.memory
    if factor is None or factor <= 1 or memory is None or memory.n == 0:
        return Rule("length", None, "no longer sequence was run in flash's memory", False)
    fits = _below(memory, MEMORY_TOLERANCE)
    holds = False if factor < LENGTH_FACTOR else fits
    text = f"{factor:g}x the sequence length with peak memory {_percent(memory)} (needs 2x in the same)"
    return Rule("length", holds, text)


def entropy_rule(evidence: Evidence) -> Rule:
    """Head entropy predicts head importance, and flash's does not."""
    if evidence.entropy_p is None or evidence.flash_entropy_p is None:
        return Rule("entropy", None, "head importance was not measured", evaluated=False)
    predicts = evidence.entropy_p < SIGNIFICANCE
    flash_predicts = evidence.flash_entropy_p < SIGNIFICANCE
    r = "" if evidence.entropy_r is None else f"r = {evidence.entropy_r:+.2f}, "
    text = (
        f"entropy against head importance: {r}corrected p = {evidence.entropy_p:.3g}, "
        f"flash's p = {evidence.flash_entropy_p:.3g}"
    )
    return Rule("entropy", predicts and not flash_predicts, text)


def _below(summary: Summary, limit: float) -> bool | None:
    """Whether the whole interval lies at or below `limit` (True), above it (False), or spans it."""
    if summary.low is None or summary.high is None:
        return None
    if summary.high <= limit:
        return True
    return False if summary.low > limit else None


def _percent(summary: Summary) -> str:
    if summary.mean is None:
        return "not comparable (no common seed)"
    if summary.low is None or summary.high is None:
        return f"{summary.mean:+.1%} (n = 1, no interval)"
    return f"{summary.mean:+.1%} [{summary.low:+.1%}, {summary.high:+.1%}]"
