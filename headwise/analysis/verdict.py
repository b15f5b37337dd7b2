"""GO, NO-GO or INCONCLUSIVE for one variant against the baseline (attention variant study, milestone M6).

A study states beforehand which criteria earn a GO (`study.criteria`):

    memory          validation loss within +5% and at least 20% lower peak memory
    length          at least twice the sequence length in the same memory, and within +5%
    entropy_signal  within +5%, and the entropy of heads predicts their importance, the baseline's does not
    quality         lower loss by at least the smallest difference that matters, at equal compute

GO if any of them holds. NO-GO if none does, or if training is unstable. A criterion whose 95% interval
spans its threshold is undecided, and an undecided criterion that could still turn the verdict makes it
INCONCLUSIVE. Intervals are the simultaneous ones of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headwise.analysis.conclusion import signed
from headwise.analysis.importance import Signal
from headwise.analysis.statistics import Summary
from headwise.errors import HeadwiseError, one_of

LOSS_MARGIN = 0.05
MEMORY_SAVING = 0.20
LENGTH_FACTOR = 2.0
MEMORY_TOLERANCE = 0.01  # "the same memory": allocators round
COMPUTE_TOLERANCE = 0.02  # "equal compute": whole steps cannot meet a budget exactly
SIGNIFICANCE = 0.05
NONFINITE_SHARE = 0.001
SPIKE_SHARE = 0.01


@dataclass(frozen=True)
class Evidence:
    """Plain numbers about one variant, relative to the baseline on the same seeds. None = not measured.

    Attributes:
        loss: relative difference of the loss (0.05 = 5% above the baseline).
        metric: which loss that is, in words.
        baseline: its name.
        memory: relative difference of the peak memory (-0.2 = 20% below): of the device, or of the
            process where `on_cpu`.
        length_factor: sequence length over the baseline's.
        longest: the longest trainable sequence and the baseline's, both searched in `longest_mb` of memory.
        doubt: why the losses cannot be compared at all; None where they can.
        difference: of the losses, in nats; `smallest` is the smallest that matters.
        compute: training FLOPs over the baseline's.
        signal, baseline_signal: entropy against head importance; `signal_p`, `baseline_signal_p` are
            their p-values, corrected over all variants.
        learned: False where the variant or the baseline stayed at chance, or where it was before training.
        nonfinite_share, spike_share: shares of steps, of the worst run that trained.
        diverged: runs that stopped as diverged, of `started`.
    """

    loss: Summary
    metric: str = "validation loss"
    baseline: str = "the baseline"
    memory: Summary | None = None
    on_cpu: bool = False
    length_factor: float | None = None
    longest: tuple[int, int] | None = None
    longest_mb: float | None = None
    difference: Summary | None = None
    smallest: float = 0.0
    doubt: str | None = None
    compute: float | None = None
    signal: Signal | None = None
    signal_p: float | None = None
    baseline_signal: Signal | None = None
    baseline_signal_p: float | None = None
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


def judge(evidence: Evidence, criteria: Sequence[str] | None = None) -> Verdict:
    """Draw the verdict on one variant from its evidence against the baseline.

    Args:
        criteria: names out of `CRITERIA`, any of which earns a GO; by default those of the attention variant
            study.
    """
    stability = stability_rule(evidence)
    loss = loss_rule(evidence)
    ways = [CRITERIA[name](evidence) for name in (DEFAULT_CRITERIA if criteria is None else criteria)]
    rules = [stability, loss, *ways]

    def verdict(word: str, by: Rule, text: str) -> Verdict:
        return Verdict(word, by.name, text, rules)

    if stability.holds is False:
        return verdict("NO-GO", stability, f"training is unstable: {stability.text}")
    if not evidence.learned or evidence.doubt is not None:
        return verdict("INCONCLUSIVE", loss, loss.text)
    if loss.holds is False:
        return verdict("NO-GO", loss, f"every criterion needs the loss within +5%: {loss.text}")

    def both(way: Rule) -> bool | None:
        if not way.evaluated or way.holds is False:
            return False
        within = loss.holds or way.name == "quality"  # a lower loss is within +5%
        return True if way.holds and within else None

    def text(way: Rule) -> str:
        return f"{way.text}; {loss.text}"

    outcome = {way.name: both(way) for way in ways}
    for way in ways:
        if outcome[way.name]:
            return verdict("GO", way, text(way))
    for way in ways:
        if outcome[way.name] is None:
            return verdict("INCONCLUSIVE", way, text(way))
    missing = "; ".join(way.text for way in ways if not way.evaluated)
    evaluated = [way for way in ways if way.evaluated]
    if not evaluated:
        return verdict("INCONCLUSIVE", loss, f"{loss.text}, but {missing}")
    failed = "; ".join(way.text for way in evaluated)
    which = "the criterion does not hold" if len(ways) == 1 else "no criterion holds"
    return verdict(
        "NO-GO", evaluated[0], f"{which}: {failed}; {loss.text}" + (f" ({missing})" if missing else "")
    )


def check_criteria(criteria: Any) -> None:
    """Refuse what is not a list of criteria.

    Raises:
        HeadwiseError: not a list, an empty one, a name that is not known or that comes twice.
    """
    if not isinstance(criteria, list | tuple) or not criteria:
        raise HeadwiseError(f"criteria is {criteria!r}; give a list of {', '.join(CRITERIA)}")
    for name in criteria:
        one_of("criteria", str(name), CRITERIA)
    if len(set(criteria)) < len(criteria):
        raise HeadwiseError(f"criteria names one criterion twice: {', '.join(criteria)}; name each once")


def stability_rule(evidence: Evidence) -> Rule:
    """Unstable: a run with over 0.1% of steps not finite or over 1% gradient spikes, or a diverged one."""
    troubles = []
    if evidence.diverged:
        troubles.append(f"{evidence.diverged} of {evidence.started} runs diverged")
    shares = [
        (evidence.nonfinite_share, NONFINITE_SHARE, "steps with non-finite values"),
        (evidence.spike_share, SPIKE_SHARE, "steps with gradient spikes"),
    ]
    known = [(share, limit, what) for share, limit, what in shares if share is not None]
    troubles += [
        f"a run has {share:.2%} {what} (limit {limit:.1%})" for share, limit, what in known if share > limit
    ]
    if troubles:
        return Rule("stability", False, "; ".join(troubles))
    if not known:
        text = "non-finite steps and gradient spikes were not recorded; training the runs again records them"
        return Rule("stability", True, text, evaluated=False)
    calm = ", ".join(f"at most {share:.2%} {what} (limit {limit:.1%})" for share, limit, what in known)
    return Rule("stability", True, calm)


def loss_rule(evidence: Evidence) -> Rule:
    """Validation loss within +5% of the baseline's; open where the losses cannot be compared."""
    if evidence.doubt is not None:
        return Rule("loss", None, evidence.doubt)
    if not evidence.learned:
        return Rule("loss", None, "nothing was learned, so losses say nothing")
    holds = _below(evidence.loss, LOSS_MARGIN)
    text = f"{evidence.metric} {_percent(evidence.loss)} against {evidence.baseline} (limit +5%)"
    return Rule("loss", holds, text)


def memory_rule(evidence: Evidence) -> Rule:
    """At least 20% lower peak memory than the baseline.

    On a CPU it is the peak of the process, which holds the interpreter and the libraries too: a saving
    of 20% there is one, more memory than the baseline's is none, and what lies between is not evaluated.
    """
    memory = evidence.memory
    if memory is None or memory.n == 0:
        text = "peak memory of both on one device was not measured; runs on one GPU would evaluate it"
        return Rule("memory", None, text, evaluated=False)
    holds = _below(memory, -MEMORY_SAVING)
    if not evidence.on_cpu:
        return Rule("memory", holds, f"peak memory {_percent(memory)} (needs -20%)")
    text = f"peak memory of the process {_percent(memory)} (needs -20%)"
    if holds or (memory.low is not None and memory.low > 0):
        return Rule("memory", holds, text)
    text += ", libraries included, so that the rule is not evaluated on CPU; runs on a GPU would evaluate it"
    return Rule("memory", None, text, evaluated=False)


def length_rule(evidence: Evidence) -> Rule:
    """At least twice the sequence length in the same memory: by search, else by runs.

    The peak of a process on a CPU holds the libraries too, so that by runs there it can only fail.
    """
    if evidence.longest is not None and evidence.longest[1]:
        mine, base = evidence.longest
        text = (
            f"trains sequences of {mine:,} tokens in {evidence.longest_mb:,.0f} MB, {mine / base:.2g}x the "
            f"{base:,} of {evidence.baseline} (needs 2x)"
        )
        return Rule("length", mine >= LENGTH_FACTOR * base, text)
    factor, memory = evidence.length_factor, evidence.memory
    if factor is None or factor <= 1:
        text = "no longer sequence was run; the variant at twice data.seq_len or more would evaluate that"
        return Rule("length", None, text, evaluated=False)
    if memory is None or memory.n == 0:
        text = "peak memory at the longer sequence was not measured; runs on one GPU would evaluate it"
        return Rule("length", None, text, evaluated=False)
    fits = _below(memory, MEMORY_TOLERANCE)
    holds = False if factor < LENGTH_FACTOR else fits
    what = "peak memory of the process" if evidence.on_cpu else "peak memory"
    text = f"{factor:g}x the sequence length with {what} {_percent(memory)} (needs 2x in the same)"
    if evidence.on_cpu and holds is not False:
        text += (
            ", which includes the libraries, so that the rule is not evaluated on CPU; runs on a GPU would"
        )
        text += " evaluate it"
        return Rule("length", None, text, evaluated=False)
    return Rule("length", holds, text)


def entropy_rule(evidence: Evidence) -> Rule:
    """Head entropy predicts head importance, and the baseline's does not."""
    name, mine, base = "entropy_signal", evidence.signal, evidence.baseline_signal
    if mine is None or base is None or mine.r is None or base.r is None:
        where = "here" if mine is None or mine.r is None else f"of {evidence.baseline}"
        text = f"entropy against head importance was not measured {where}; runs with measure.importance: true"
        text += " and measure.heads: true would evaluate it, if three heads or more have an entropy"
        return Rule(name, None, text, evaluated=False)
    text = (
        f"entropy against head importance: {_correlation(mine, evidence.signal_p)}; "
        f"{evidence.baseline}: {_correlation(base, evidence.baseline_signal_p)}"
    )
    if evidence.signal_p is None or evidence.baseline_signal_p is None:
        return Rule(name, None, f"{text}; two seeds or more would evaluate it", evaluated=False)
    predicts = evidence.signal_p < SIGNIFICANCE
    return Rule(name, predicts and evidence.baseline_signal_p >= SIGNIFICANCE, text)


def quality_rule(evidence: Evidence) -> Rule:
    """Lower loss by at least the smallest difference that matters, at equal compute.

    At less compute it can only hold, at more it can only fail: what else was found there is open.
    """
    difference, compute = evidence.difference, evidence.compute

    def open_(text: str) -> Rule:
        return Rule("quality", None, f"{text} would evaluate quality", evaluated=False)

    if difference is None or difference.mean is None:
        return open_("the losses have no seed in common; runs on common seeds")
    if evidence.doubt is not None:
        return open_(f"{evidence.doubt}; runs without that flaw")
    interval = "n = 1, no interval"
    if difference.low is not None and difference.high is not None:
        interval = f"{signed(difference.low)}, {signed(difference.high)}"
    text = f"loss {signed(difference.mean)} nats [{interval}] (needs {signed(-evidence.smallest)})"
    if compute is None:
        return open_(f"{text}, but FLOPs were not recorded; runs that record them")
    text += f" at {compute:.3g}x the compute"
    holds = _below(difference, -evidence.smallest)
    unequal = (compute > 1 + COMPUTE_TOLERANCE and holds is not False) or (
        compute < 1 - COMPUTE_TOLERANCE and holds is not True
    )
    return open_(f"{text}; runs on a budget of kind flops") if unequal else Rule("quality", holds, text)


CRITERIA: dict[str, Callable[[Evidence], Rule]] = {
    "memory": memory_rule,
    "length": length_rule,
    "entropy_signal": entropy_rule,
    "quality": quality_rule,
}
DEFAULT_CRITERIA = ("memory", "length", "entropy_signal")


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


def _correlation(found: Signal, p: float | None) -> str:
    if found.low is None or found.high is None or p is None:
        return f"r = {found.r:+.2f} (one seed, no test)"
    return f"r = {found.r:+.2f} [{found.low:+.2f}, {found.high:+.2f}], corrected p = {p:.3g}"
