"""What a study concludes of every variant against its baseline: conclusion, costs, distrust, verdict."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from headwise.analysis.conclusion import (
    DEFAULT_SMALLEST,
    Conclusion,
    conclude,
    signed,
    smallest_difference,
)
from headwise.analysis.honesty import Flag, RunFacts
from headwise.analysis.importance import Signal, head_correlation, signal
from headwise.analysis.statistics import Summary, holm, summarize
from headwise.analysis.verdict import Evidence, check_criteria, judge
from headwise.report.atlas import columns_of
from headwise.report.compare import Family, Material, compared, family, most, relative_to
from headwise.runs.read import Run, longest_of

OF_A_PLACE = "memory"
"""The cost whose place is named: the device's memory, or the whole process's."""
COSTS = {"parameters": "parameters", "compute": "compute", "memory": "memory", "tokens_per_sec": "tokens/s"}
MEMORY = {"device": "peak_vram_mb", "process": "peak_rss_mb"}
METRICS = {"val_loss": "validation loss", "train_loss": "training loss, smoothed"}
ONLY_ONE = "No conclusion: {} is the only variant here, and a conclusion compares variants with a baseline."


def conclude_all(
    material: Material,
    references: Mapping[str, str],
    plan: dict[str, Any],
    flags: Sequence[Flag],
    grids: dict[str, list[tuple[Run, bool, dict[str, Any]]]],
) -> dict[str, Any]:
    """Conclusions and verdicts of every variant but the baselines, and the signals of their heads.

    Args:
        references: variant -> the baseline that it is compared with.
        plan: of the study, whose `smallest_difference` and `criteria` count.
        flags: of the honesty checks.
        grids: variant -> [(run, whether it may be averaged, its head table as arrays)].

    Raises:
        HeadwiseError: the plan has a `smallest_difference` or `criteria` that cannot be.
    """
    others = compared(material, references)
    signals = head_signals(material, grids)
    found: dict[str, Any] = {"signals": signals, "conclusions": [], "verdicts": [], "kinds": [],
                             "conclusion_note": None}  # fmt: skip
    criteria = plan.get("criteria")
    if criteria is not None:
        check_criteria(criteria)
    size = plan.get("smallest_difference", DEFAULT_SMALLEST)
    smallest_difference(size, None)
    if not others:
        return found | {"conclusion_note": ONLY_ONE.format(next(iter(material.variants), "none"))}
    metric = next((m for m in METRICS if any(material.values(v, m) for v in material.variants)), "val_loss")
    losses = family(material, references, metric)
    memories = {of: family(material, references, key) for of, key in MEMORY.items()}
    for name in others:
        reference = references[name]
        smallest = smallest_difference(size, summarize(material.values(reference, metric).values()).mean)
        doubt = _doubt(material, reference, name, flags)
        result = conclude(losses.pairs[name], smallest, losses.comparisons, doubt=doubt)
        memory = memories[memory_of(material, reference, name)]
        evidence = _evidence(material, losses, memory, name, result, signals)
        found["conclusions"].append(_row(material, losses, name, result, flags))
        found["verdicts"].append(_verdict(material, reference, name, evidence, criteria))
    found["kinds"] = _of_kinds(material, references, plan, found["verdicts"])
    return found


ORDER = ("GO", "INCONCLUSIVE", "NO-GO")


def _of_kinds(
    material: Material, references: Mapping[str, str], plan: dict[str, Any], verdicts: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One verdict a kind of attention: the best that one of its variants has, with that one's numbers."""
    planned = plan.get("variants") or {}

    def kind_of(name: str) -> Any:
        known = (planned.get(name) or {}).get("kind")
        return known or most(run.get("kind") for run in material.variants.get(name, []))

    found: dict[str, dict[str, Any]] = {}
    for verdict in verdicts:
        kind = kind_of(verdict["variant"])
        if kind is None or kind == kind_of(references[verdict["variant"]]):
            continue
        best = found.get(kind)
        if best is None or ORDER.index(verdict["verdict"]) < ORDER.index(best["verdict"]):
            found[kind] = {"kind": kind} | {key: verdict[key] for key in (
                "variant", "against", "verdict", "decided_by", "text")}  # fmt: skip
    for kind, row in found.items():
        row["of"] = sum(kind_of(verdict["variant"]) == kind for verdict in verdicts)
    return list(found.values())


def line(row: dict[str, Any]) -> str:
    """One conclusion as one line of text: variant, conclusion, difference [interval], costs, distrust."""
    return f"{row['variant']}: {row['text']}"


def words(row: dict[str, Any]) -> dict[str, str]:
    """The parts of a conclusion as text: `conclusion`, `why`, `difference`, `costs` and `distrust`."""
    return {
        "conclusion": row["conclusion"],
        "why": row["why"],
        "difference": _difference(row),
        "costs": ", ".join(_costs(row)) or "not recorded",
        "distrust": ", ".join(row["distrust"]) or "no flag",
    }


def head_signals(
    material: Material, grids: dict[str, list[tuple[Run, bool, dict[str, Any]]]]
) -> dict[str, dict[str, Any]]:
    """Entropy against head importance for each variant that has both, corrected over variants by Holm."""
    found = {}
    for name in material.variants:
        correlations = {}
        for run, used, measured in grids.get(name, []):
            r = _correlation(run, measured) if used and run.seed is not None else None
            if r is not None:
                correlations[int(run.seed or 0)] = r
        if correlations:
            found[name] = signal(correlations)
    corrected = holm([one.p for one in found.values()])
    return {
        name: asdict(one) | {"p_holm": p} for (name, one), p in zip(found.items(), corrected, strict=True)
    }


def _correlation(run: Run, measured: dict[str, Any]) -> float | None:
    importance, entropy = run.get("importance"), measured["measures"].get("entropy")
    if entropy is None or importance is None or any(part for _, part in columns_of(measured, "entropy")):
        return None  # a head of several softmaxes has several entropies and one importance
    rises, last = importance["delta_loss"], np.asarray(entropy[-1])
    # The table is as wide as its widest layer; heads that a narrower layer lacks have no value in it.
    table = [row[: len(heads)].tolist() for row, heads in zip(last, rises, strict=False)]
    return head_correlation(table, rises) if len(last) == len(rises) else None


def _doubt(material: Material, reference: str, name: str, flags: Sequence[Flag]) -> str | None:
    """Why the losses of a variant and the baseline cannot be compared; None where they can."""
    for variant in (name, reference):
        facts = material.facts_of(variant)
        if not any(f.usable for f in facts):
            return f"no run of {variant} can be used ({_why_unusable(facts)})"
    stuck = [v for v in (name, reference) if _stuck(material, v)]
    if stuck:
        return f"{' and '.join(stuck)} learned nothing, so the losses compare nothing"
    same = [
        v for v in (name, reference) if any(f.code == "identical_losses" and f.variant == v for f in flags)
    ]
    if same:
        return f"different seeds of {' and '.join(same)} end on one loss, so they are not independent runs"
    return None


def _stuck(material: Material, variant: str) -> bool:
    return any(run.at_chance or run.untrained for run in material.facts_of(variant, usable=True))


def _why_unusable(facts: list[RunFacts]) -> str:
    why = {"another engine than expected" if f.other_engine else _state(f) for f in facts}
    return "; ".join(sorted(why)) or "none"


def _state(facts: RunFacts) -> str:
    return f"{facts.state}: {facts.reason.rstrip('.')}" if facts.reason else facts.state


def _row(
    material: Material, losses: Family, name: str, result: Conclusion, flags: Sequence[Flag]
) -> dict[str, Any]:
    pairs, reference = losses.pairs[name], losses.references[name]
    costs, of = _cost_ratios(material, reference, name)
    row = {
        "variant": name, "against": reference, "metric": losses.metric, "unit": "nats",
        "conclusion": result.conclusion, "why": result.why, "seeds": list(pairs.seeds),
        **_interval(result.difference),
        "alone": _interval(result.alone), "p": result.p, "p_adjusted": result.p_adjusted,
        "comparisons": result.comparisons, "smallest_difference": result.smallest,
        "further_seeds": result.further_seeds, "costs": costs, "memory_of": of,
        "distrust": _distrust(material, losses, name, flags),
    }  # fmt: skip
    parts = words(row)
    to = {"better": " than", "worse": " than", "equivalent": " to"}.get(result.conclusion, " against")
    size = "" if row["mean"] is None else f"{METRICS[losses.metric]} {parts['difference']}, "
    row["text"] = (
        f"{result.conclusion}{to} {reference}: {size}{result.why}. "
        f"Costs: {parts['costs']}. Distrust: {parts['distrust']}."
    )
    return row


def _interval(summary: Summary) -> dict[str, Any]:
    return asdict(summary) | {"low": summary.low, "high": summary.high}


def _difference(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return "none"
    interval = "no interval" if row["low"] is None else f"[{signed(row['low'])}, {signed(row['high'])}]"
    seeds = f"{row['n']} seed{'' if row['n'] == 1 else 's'}"
    return f"{signed(row['mean'])} {row['unit']} {interval} ({seeds})"


def _costs(row: dict[str, Any]) -> list[str]:
    of = " (of the process)" if row["memory_of"] == "process" else ""
    return [
        f"{label} {row['costs'][name]:.2f}x{of if name == OF_A_PLACE else ''}"
        for name, label in COSTS.items()
        if row["costs"][name] is not None
    ]


def _cost_ratios(material: Material, reference: str, name: str) -> tuple[dict[str, float | None], str | None]:
    """Ratios of means to the baseline on the same seeds, and whose memory it is: device or process."""
    of = memory_of(material, reference, name)

    def ratio(key: str) -> float | None:
        a, b = material.pair(reference, name, key)
        seeds = sorted(set(a) & set(b))
        base = sum(a[seed] for seed in seeds)
        return sum(b[seed] for seed in seeds) / base if base else None

    costs = {
        "parameters": ratio("params_total"), "compute": ratio("flops"),
        "memory": ratio(MEMORY[of]), "tokens_per_sec": ratio("tokens_per_sec"),
    }  # fmt: skip
    return costs, of if costs["memory"] is not None else None


def memory_of(material: Material, reference: str, name: str) -> str:
    """Whose peak memory both have: the device's, else the process's."""
    a, b = material.pair(reference, name, MEMORY["device"])
    return "device" if set(a) & set(b) else "process"


def _distrust(material: Material, losses: Family, name: str, flags: Sequence[Flag]) -> list[str]:
    """What the flags say of this comparison, in a word or two each, and the seeds that are not in it."""
    found, reference = [], losses.references[name]
    for flag in flags:
        if not flag.about or name in flag.about:
            found.append(flag.short)
        elif reference in flag.about:
            found.append(f"{flag.short} ({reference})")
    planned = {f.seed for v in (name, reference) for f in material.facts_of(v) if f.seed is not None}
    missing = sorted(planned - set(losses.pairs[name].seeds))
    if missing and losses.pairs[name].seeds:
        listed = ", ".join(map(str, missing))
        found.append(f"seed{'s' if len(missing) > 1 else ''} {listed} without a pair")
    return list(dict.fromkeys(found))


def _evidence(
    material: Material,
    losses: Family,
    memory: Family,
    name: str,
    result: Conclusion,
    signals: dict[str, dict[str, Any]],
) -> Evidence:
    reference = losses.references[name]
    facts = material.facts_of(name)
    lengths = [most(run.get("seq_len") for run in material.usable(v)) for v in (reference, name)]
    flops, base_flops = (_mean(material, v, "flops") for v in (name, reference))
    mine, base = (signals.get(v) for v in (name, reference))
    return Evidence(
        loss=relative_to(material, losses, name),
        metric=METRICS[losses.metric],
        baseline=reference,
        memory=relative_to(material, memory, name),
        on_cpu=memory.metric == MEMORY["process"],
        longest=_longest(material, reference, name),
        longest_mb=_searched(material, reference).get("limit_mb"),
        length_factor=lengths[1] / lengths[0] if all(lengths) else None,
        difference=result.difference,
        doubt=result.doubt,
        smallest=result.smallest,
        compute=flops / base_flops if flops and base_flops else None,
        signal=_signal(mine),
        signal_p=mine["p_holm"] if mine else None,
        baseline_signal=_signal(base),
        baseline_signal_p=base["p_holm"] if base else None,
        learned=not any(_stuck(material, v) for v in (name, reference)),
        nonfinite_share=_worst(facts, "nonfinite_share"),
        spike_share=_worst(facts, "spike_share"),
        diverged=sum(f.state == "diverged" for f in facts),
        started=sum(f.state not in ("skipped", "planned") for f in facts),
    )


def _longest(material: Material, reference: str, name: str) -> tuple[int, int] | None:
    """The longest trainable sequences of both, where they were searched in the same memory."""
    mine, base = (_searched(material, variant) for variant in (name, reference))
    if mine.get("limit_mb") != base.get("limit_mb") or base.get("capped"):
        return None
    lengths = (mine.get("max_seq_len"), base.get("max_seq_len"))
    return lengths if all(isinstance(one, int) for one in lengths) else None  # type: ignore[return-value]


def _searched(material: Material, variant: str) -> dict[str, Any]:
    """What a search for the longest sequence found for a variant; empty where none was made."""
    name = re.sub(r"@seq_len=[^@]*", "", variant)
    return next((row for row in longest_of(material.variants[variant]) if row["variant"] == name), {})


def _signal(found: dict[str, Any] | None) -> Signal | None:
    return None if found is None else Signal(*(found[k] for k in ("seeds", "r", "low", "high", "p")))


def _mean(material: Material, variant: str, key: str) -> float | None:
    return summarize(material.values(variant, key).values()).mean


def _worst(runs: list[RunFacts], name: str) -> float | None:
    """The largest share of any run: one unstable run is what the honesty checks flag, too."""
    return max((getattr(f, name) for f in runs if getattr(f, name) is not None), default=None)


def _verdict(
    material: Material, reference: str, name: str, evidence: Evidence, criteria: list[str] | None
) -> dict[str, Any]:
    facts = material.facts_of(name)
    head = {"variant": name, "against": reference}
    if any(f.usable or f.state == "diverged" for f in facts):
        return head | asdict(judge(evidence, criteria))
    text = f"no run can be used ({_why_unusable(facts)})"
    return head | {"verdict": "INCONCLUSIVE", "decided_by": "runs", "rules": [], "text": text}
