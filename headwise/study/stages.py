"""Stages: variants that wait for other variants and take overrides from the best of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headwise.analysis.choice import HIGHEST, separation
from headwise.runs.values import values_of
from headwise.study.study import CRITERIA, BestOf


@dataclass(frozen=True)
class Choice:
    """The choice of a stage.

    Attributes:
        best: name of the chosen variant; None if no variant finished with a value.
        by: the compared number.
        values: variant -> its mean over the seeds that finished, of those that have one.
        text: the choice and its reason, a sentence.
        doubt: why the choice may be noise, a clause; None where the best is separated from all others.
    """

    best: str | None
    by: str
    values: dict[str, float]
    text: str
    doubt: str | None = None


def choose(stage: BestOf, folder: Path, seeds: dict[str, list[int]]) -> Choice | None:
    """The best of the variants that a stage waits for; None while one of their runs has not ended.

    Args:
        folder: of the study.
        seeds: of each variant.
    """
    found = {name: values_of(folder / name, seeds[name], stage.by) for name in stage.among}
    if not all(one.ended() for one in found.values()):
        return None
    values = {name: one.mean for name, one in found.items() if one.mean is not None}
    if not values:
        text = f"no run of {', '.join(stage.among)} finished with a {stage.by}, so none is the best of them"
        return Choice(None, stage.by, values, text)
    end = CRITERIA[stage.by]
    best = (max if end == HIGHEST else min)(values, key=lambda name: values[name])
    listed = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
    without = [name for name in stage.among if name not in values]
    missing = f"; without a finished run: {', '.join(without)}" if without else ""
    doubt = separation(best, {name: found[name].by_seed for name in values}).doubt
    text = f"{best} has the {end} {stage.by} of {listed}{missing}{f'; {doubt}' if doubt else ''}"
    return Choice(best, stage.by, values, text, doubt)
