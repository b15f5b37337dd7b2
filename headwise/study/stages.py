"""Stages: variants that wait for other variants and take overrides from the best of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from headwise.runs.folder import RESULTS, RunFolder, state_of
from headwise.study.study import CRITERIA, HIGHEST, BestOf


@dataclass(frozen=True)
class Choice:
    """The choice of a stage.

    Attributes:
        best: name of the chosen variant; None if no variant finished with a value.
        by: the compared number.
        values: variant -> its mean over the seeds that finished, of those that have one.
        text: the choice and its reason, a sentence.
    """

    best: str | None
    by: str
    values: dict[str, float]
    text: str


def choose(stage: BestOf, folder: Path, seeds: dict[str, list[int]]) -> Choice | None:
    """The best of the variants that a stage waits for; None while one of their runs has not ended.

    Args:
        folder: of the study.
        seeds: of each variant.
    """
    values: dict[str, float] = {}
    for name in stage.among:
        runs = [RunFolder(folder / name / f"seed_{seed}") for seed in seeds[name]]
        states = [state_of(run.read_status()) for run in runs]
        if any(state not in (*RESULTS, "skipped") for state in states):
            return None
        found = [run.read_summary().get(stage.by) for run, state in zip(runs, states, strict=True)
                 if state == "finished"]  # fmt: skip
        known = [float(value) for value in found if value is not None and math.isfinite(value)]
        if known:
            values[name] = sum(known) / len(known)
    if not values:
        text = f"no run of {', '.join(stage.among)} finished with a {stage.by}, so none is the best of them"
        return Choice(None, stage.by, values, text)
    end = CRITERIA[stage.by]
    best = (max if end == HIGHEST else min)(values, key=lambda name: values[name])
    listed = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
    without = [name for name in stage.among if name not in values]
    missing = f"; without a finished run: {', '.join(without)}" if without else ""
    return Choice(best, stage.by, values, f"{best} has the {end} {stage.by} of {listed}{missing}")
