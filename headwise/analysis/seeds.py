"""Selects the runs of a group that count as seeds: each seed once, and none that repeats another.

More values make every interval narrower, so that a value that counts twice can show a difference where there
is none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from headwise.analysis.statistics import Summary, summarize

FINE = 9
"""With so many significant digits, two seeds do not give the same value by chance."""
LARGEST = 1e100


@dataclass(frozen=True)
class Value:
    """One run's value of a measure.

    Attributes:
        seed: of the run.
        value: None if the run has none.
        why: the reason for None, such as `diverged`.
        configuration: a fingerprint of everything but the seed; empty if unknown.
        data: the checksum of its data; empty if unknown.
    """

    seed: int
    value: float | None
    why: str = ""
    configuration: str = ""
    data: str = ""


@dataclass(frozen=True)
class Counted:
    """The seeds of one group that count.

    Attributes:
        values: seed -> value, in the order of the seeds.
        notes: the omitted runs with the reasons, a clause each.
        doubt: the reason why the group cannot be compared at all; None if it can.
    """

    values: dict[int, float]
    notes: tuple[str, ...]
    doubt: str | None


def usable(value: float | None) -> TypeGuard[float]:
    """Whether a run has a value that can be compared: its square must be finite too."""
    return value is not None and abs(value) <= LARGEST


def summarize_differences(differences: Sequence[float], values: Iterable[float]) -> Summary:
    """Summary of differences between `values`; a spread as small as their rounding errors counts as 0."""
    found = summarize(differences)
    rounding = 8 * math.ulp(max(map(abs, values), default=0.0))
    return replace(found, std=0.0, ci95=0.0) if found.std is not None and found.std <= rounding else found


def fine(value: float) -> bool:
    """Whether a number has so many digits that another computation does not give it by chance."""
    digits = repr(float(value)).lower().split("e")[0].replace(".", "").lstrip("-0").rstrip("0")
    return math.isfinite(value) and len(digits) >= FINE


def count(values: Iterable[Value], name: str) -> Counted:
    """Count each seed of the group `name` once; the order of the runs does not matter."""
    runs: dict[int, list[Value]] = defaultdict(list)
    for run in values:
        runs[run.seed].append(run)
    counted: dict[int, float] = {}
    failed: list[str] = []
    notes: list[str] = []
    for seed in sorted(runs):
        finite = [run.value for run in runs[seed] if usable(run.value)]
        distinct = sorted(set(finite))
        if not finite:
            why = ", ".join(sorted({_why(run) for run in runs[seed]}))
            failed.append(f"{seed} ({why})")
        elif len(distinct) > 1:
            shown = " and ".join(f"{value:.6g}" for value in distinct)
            if len(set(shown.split(" and "))) < len(distinct):
                shown = " and ".join(map(repr, distinct))
            notes.append(f"seed {seed} of {name} gave {shown}, so it is not counted")
        else:
            counted[seed] = distinct[0]
            if len(finite) > 1:
                notes.append(f"seed {seed} of {name} ran {len(finite)} times with one value, counted once")
    if failed:
        notes.append(f"{len(failed)} of {len(runs)} seeds of {name} gave no value: {', '.join(failed)}")
    repeats = _repeats(counted)
    for seed, first in repeats.items():
        del counted[seed]
        notes.append(f"seeds {first} and {seed} of {name} gave exactly the same value, counted once")
    return Counted(counted, tuple(notes), _doubt(name, runs, counted, bool(repeats)))


def _why(run: Value) -> str:
    if run.value is not None:
        return f"{run.value:.3g}, too large to compare" if math.isfinite(run.value) else "not finite"
    return run.why or "no value"


def _repeats(counted: dict[int, float]) -> dict[int, int]:
    """Seed -> the smaller seed whose value it repeats digit for digit."""
    if len(set(counted.values())) == len(counted):
        return {}
    first: dict[float, int] = {}
    return {
        seed: first[value]
        for seed, value in counted.items()
        if fine(value) and first.setdefault(value, seed) != seed
    }


def _doubt(name: str, runs: dict[int, list[Value]], counted: dict[int, float], repeats: bool) -> str | None:
    configurations = {run.configuration for seed in runs for run in runs[seed] if run.configuration}
    if len(configurations) > 1:
        return f"the runs of {name} have {len(configurations)} configurations, so they are not one group"
    if (len(counted) == 1 and repeats) or (len(counted) > 1 and len(set(counted.values())) == 1):
        return f"different seeds of {name} gave the same value, so they are not independent"
    return None
