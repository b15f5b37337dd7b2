"""Variants against each other: paired comparisons and verdicts, from the runs that may be averaged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from headwise.analysis.honesty import RunFacts
from headwise.analysis.statistics import holm, paired, relative
from headwise.analysis.verdict import Evidence, judge
from headwise.runs.read import Run

COMPARED = ("val_loss", "train_loss", "val_accuracy", "tokens_per_sec", "peak_vram_mb")


@dataclass(frozen=True)
class Material:
    """The runs of every variant, and what the honesty checks know of each (by `id()` of the run)."""

    variants: dict[str, list[Run]]
    facts: dict[int, RunFacts]

    @property
    def used(self) -> set[int]:
        """`id()` of the runs that may be averaged."""
        return {key for key, facts in self.facts.items() if facts.usable}

    def usable(self, variant: str) -> list[Run]:
        """Runs of a variant that may be averaged."""
        return [run for run in self.variants[variant] if self.facts[id(run)].usable]

    def facts_of(self, variant: str, usable: bool = False) -> list[RunFacts]:
        """Facts of a variant's runs."""
        found = [self.facts[id(run)] for run in self.variants[variant]]
        return [facts for facts in found if facts.usable] if usable else found

    def pair(self, a: str, b: str, key: str) -> tuple[dict[int, float], dict[int, float]]:
        """Seed -> value of two variants, on the seeds where both read the same data."""
        sums = [{f.seed: f.data_checksum for f in self.facts_of(name, usable=True)} for name in (a, b)]
        same = {s for s in sums[0] if s is not None and s in sums[1] and sums[0][s] == sums[1][s]}
        first, second = (self._values(name, key) for name in (a, b))
        return {s: v for s, v in first.items() if s in same}, {s: v for s, v in second.items() if s in same}

    def _values(self, variant: str, key: str) -> dict[int, float]:
        found = {run.seed: number(run, key) for run in self.usable(variant)}
        return {s: v for s, v in found.items() if s is not None and v is not None and math.isfinite(v)}


def comparisons(material: Material, reference: str | None) -> list[dict[str, Any]]:
    """Every variant against the baseline, metric by metric; Holm's correction within each metric."""
    rows = []
    others = [name for name in material.variants if reference is not None and name != reference]
    for metric in COMPARED:
        family = [row for name in others if (row := _compare(material, str(reference), name, metric))]
        corrected = holm([row["p_t"] for row in family])
        rows += [row | {"p_holm": p} for row, p in zip(family, corrected, strict=True)]
    return rows


def _compare(material: Material, reference: str, name: str, metric: str) -> dict[str, Any] | None:
    a, b = material.pair(reference, name, metric)
    result = paired(a, b)
    if not result.seeds:
        return None
    share = None if any(a[seed] == 0 for seed in result.seeds) else relative(a, b)
    return {
        "metric": metric, "variant": name, "baseline": reference, "seeds": list(result.seeds),
        "differences": [b[seed] - a[seed] for seed in result.seeds],
        **asdict(result.difference), "low": result.difference.low, "high": result.difference.high,
        "relative": None if share is None else asdict(share),
        "p_t": result.p_t, "p_wilcoxon": result.p_wilcoxon,
    }  # fmt: skip


def verdicts(material: Material, reference: str | None) -> dict[str, Any]:
    """A verdict for every kind against flash: the baseline if it is flash, else the first flash."""
    kinds = {name: most(run.get("kind") for run in runs) for name, runs in material.variants.items()}
    flash = [name for name, kind in kinds.items() if kind == "flash"]
    against = reference if reference in flash else next(iter(flash), None)
    if against is None:
        return _none("No verdict: it is drawn against flash, which is not here.")
    others = [name for name in material.variants if name not in flash]
    if not others:
        return _none("No verdict: there is no other kind beside flash.")
    return {"verdicts": [_verdict(material, against, name) for name in others], "verdict_note": None}


def _none(note: str) -> dict[str, Any]:
    return {"verdicts": [], "verdict_note": note}


def _verdict(material: Material, flash: str, name: str) -> dict[str, Any]:
    facts = material.facts_of(name)
    head = {"variant": name, "against": flash}
    if any(f.usable or f.state == "diverged" for f in facts):
        return head | asdict(judge(_evidence(material, flash, name)))
    why = sorted({"another engine than expected" if f.other_engine else _state(f) for f in facts})
    text = f"no run can be used ({'; '.join(why) or 'none'})"
    return head | {"verdict": "INCONCLUSIVE", "decided_by": "runs", "rules": [], "text": text}


def _state(facts: RunFacts) -> str:
    return f"{facts.state}: {facts.reason}" if facts.reason else facts.state


def _evidence(material: Material, flash: str, name: str) -> Evidence:
    memory = relative(*material.pair(flash, name, "peak_vram_mb"))
    facts = material.facts_of(name)
    both = [*material.facts_of(name, usable=True), *material.facts_of(flash, usable=True)]
    lengths = [most(run.get("seq_len") for run in material.usable(v)) for v in (flash, name)]
    return Evidence(
        loss=relative(*material.pair(flash, name, "val_loss")),
        memory=memory if memory.n else None,
        on_cpu=most(run.get("device") for run in material.variants[name]) == "cpu",
        length_factor=lengths[1] / lengths[0] if all(lengths) else None,
        learned=not any(run.at_chance or run.untrained for run in both),
        nonfinite_share=_share(facts, "nonfinite_share"),
        spike_share=_share(facts, "spike_share"),
        diverged=sum(f.state == "diverged" for f in facts),
        started=sum(f.state not in ("skipped", "planned") for f in facts),
    )


def _share(runs: list[RunFacts], name: str) -> float | None:
    """Share of all steps that were taken, over runs of different length."""
    known = [(getattr(f, name), f.step or 1) for f in runs if getattr(f, name) is not None]
    steps = sum(step for _, step in known)
    return sum(share * step for share, step in known) / steps if steps else None


def number(run: Run, name: str) -> float | None:
    """One figure of a run; `final_loss` is its validation loss, or training loss without one."""
    if name == "final_loss":
        val = number(run, "val_loss")
        return number(run, "train_loss") if val is None else val
    value = run.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def most(values: Iterable[Any]) -> Any:
    """The value that occurs most often; None where there is none."""
    known = Counter(value for value in values if value is not None)
    return known.most_common(1)[0][0] if known else None
