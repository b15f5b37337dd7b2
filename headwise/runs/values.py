"""One number of several seeds of one setting, read from their folders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.runs.folder import RESULTS, RunFolder, state_of


@dataclass(frozen=True)
class Values:
    """What the seeds of a setting came to.

    Attributes:
        by_seed: seed -> the number, of the runs that finished with a finite one.
        states: seed -> state of its run.
        reason: why the first run without a number has none; empty where all have one.
        data: seed -> checksum of the data that its run read.
    """

    by_seed: dict[int, float]
    states: dict[int, str]
    reason: str
    data: dict[int, str]

    def ended(self, *, failed: bool = False) -> bool:
        """Whether no run is still to come; with `failed`, a run that failed is not to come either."""
        over = (*RESULTS, "skipped", *(["failed"] if failed else []))
        return all(state in over for state in self.states.values())

    @property
    def mean(self) -> float | None:
        """Over all seeds that have a number."""
        known = list(self.by_seed.values())
        return sum(known) / len(known) if known else None


def values_of(folder: Path, seeds: Sequence[int], by: str) -> Values:
    """Read `folder/seed_<n>` of each seed.

    Args:
        by: a number of `summary.json`.

    Raises:
        HeadwiseError: a status or summary is damaged, or of a newer headwise.
    """
    found: dict[int, float] = {}
    states: dict[int, str] = {}
    data: dict[int, str] = {}
    reason = ""
    for seed in seeds:
        run = RunFolder(folder / f"seed_{seed}")
        status = run.read_status()
        states[seed] = state_of(status)
        summary: dict[str, Any] = run.read_summary() if states[seed] == "finished" else {}
        value = summary.get(by)
        if value is not None and math.isfinite(value):
            found[seed] = float(value)
        elif not reason:
            said = str(status.get("reason") or "")
            reason = (
                f"no finite {by}" if states[seed] == "finished" else f"{states[seed]}{said and ': '}{said}"
            )
        if summary.get("data_checksum"):
            data[seed] = str(summary["data_checksum"])
    return Values(found, states, reason, data)
