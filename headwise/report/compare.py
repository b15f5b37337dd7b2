"""Variants against the baseline: paired comparisons, from the runs that may be averaged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headwise.analysis.honesty import RunFacts
from headwise.analysis.statistics import Paired, Summary, max_t, paired, relative, simultaneous
from headwise.runs.read import Run

COMPARED = ("val_loss", "train_loss", "val_accuracy", "tokens_per_sec", "peak_vram_mb")
OF_DEVICE = ("tokens_per_sec", "peak_vram_mb", "peak_rss_mb")
"""Figures that only runs on the same device can be compared by."""


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
        """Seed -> value of two variants, on the seeds where both read the same data.

        Speed and memory also need the same device.
        """
        facts = [{f.seed: f for f in self.facts_of(name, usable=True)} for name in (a, b)]
        same = {
            seed
            for seed in facts[0].keys() & facts[1].keys()
            if seed is not None
            and facts[0][seed].data_checksum == facts[1][seed].data_checksum
            and (key not in OF_DEVICE or facts[0][seed].device == facts[1][seed].device)
        }
        first, second = (self.values(name, key) for name in (a, b))
        return {s: v for s, v in first.items() if s in same}, {s: v for s, v in second.items() if s in same}

    def values(self, variant: str, key: str) -> dict[int, float]:
        """Seed -> value of a variant's runs that may be averaged."""
        found = {run.seed: number(run, key) for run in self.usable(variant)}
        return {s: v for s, v in found.items() if s is not None and v is not None and math.isfinite(v)}


@dataclass(frozen=True)
class Family:
    """Every variant against its baseline on one metric.

    Attributes:
        references: variant -> its baseline; itself for a variant that has none.
        pairs: variant -> its differences to its baseline, seed by seed.
        comparisons: variants with two pairs or more, over which intervals are simultaneous.
    """

    metric: str
    references: Mapping[str, str]
    pairs: dict[str, Paired]

    @property
    def comparisons(self) -> int:
        """At least 1."""
        return max(1, sum(found.difference.n >= 2 for found in self.pairs.values()))


def compared(material: Material, references: Mapping[str, str]) -> list[str]:
    """The variants that have a baseline other than themselves."""
    return [name for name in material.variants if references.get(name, name) != name]


def family(material: Material, references: Mapping[str, str], metric: str) -> Family:
    """The paired differences of all variants but the baselines."""
    others = compared(material, references)
    pairs = {name: paired(*material.pair(references[name], name, metric)) for name in others}
    return Family(metric, references, pairs)


def relative_to(material: Material, found: Family, name: str) -> Summary:
    """`variant/baseline - 1` of one variant over common seeds, with the simultaneous interval."""
    a, b = material.pair(found.references[name], name, found.metric)
    if any(a[seed] == 0 for seed in set(a) & set(b)):
        return Summary(0, None, None, None)
    return simultaneous(relative(a, b), found.comparisons)


def comparisons(material: Material, references: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every variant against its baseline, metric by metric, with intervals simultaneous within each."""
    rows = []
    for metric in COMPARED:
        found = family(material, references, metric)
        rows += [_compare(material, found, name) for name, pairs in found.pairs.items() if pairs.seeds]
    return rows


def _compare(material: Material, found: Family, name: str) -> dict[str, Any]:
    result = found.pairs[name]
    a, b = material.pair(found.references[name], name, found.metric)
    alone, together = result.difference, simultaneous(result.difference, found.comparisons)
    share = relative_to(material, found, name)
    return {
        "metric": found.metric, "variant": name, "baseline": found.references[name],
        "seeds": list(result.seeds),
        "differences": [b[seed] - a[seed] for seed in result.seeds],
        **asdict(together), "low": together.low, "high": together.high,
        "alone": {"ci95": alone.ci95, "low": alone.low, "high": alone.high},
        "comparisons": found.comparisons, "relative": asdict(share) if share.n else None,
        "p_t": result.p_t, "p_adjusted": max_t(result.p_t, found.comparisons),
        "p_wilcoxon": result.p_wilcoxon,
    }  # fmt: skip


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
