"""Curves over training, seed by seed and as a band: lowest, mean, highest at each step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from headwise.runs.read import Run

MAX_POINTS = 300
SERIES = {
    "train": ("train", ("smooth_loss", "loss")),
    "val": ("val", ("loss",)),
    "accuracy": ("val", ("accuracy",)),
    "penalty": ("train", ("penalty",)),
}
"""Name of a curve -> its split in `metrics.csv` and the columns that may hold it, best first."""
COSTS = ("tokens", "flops")


def curves(runs: list[Run], used: set[int]) -> dict[str, Any]:
    """All curves of one variant.

    Args:
        runs: its runs.
        used: `id()` of the runs that may be averaged; others keep their own line.

    Returns:
        for each series `{steps, tokens, flops, mean, low, high, seeds: [{seed, used, steps, values}]}`.
        `mean` stops where the first seed stops, so that it never jumps when a seed ends.
    """
    found = {}
    for name, (split, columns) in SERIES.items():
        lines = [(run, *_first(run, split, columns)) for run in runs]
        lines = [line for line in lines if line[1].size]
        if lines:
            found[name] = _series(lines, split, used)
    return found


def gap(baseline: dict[str, Any], series: dict[str, Any], seeds: Collection[int]) -> dict[str, Any] | None:
    """How far a curve is from the baseline's of the same seed, itself a curve; None without pairs.

    Args:
        baseline, series: curves, as in `curves`.
        seeds: those whose runs read the same data.
    """
    first, second = (
        {line["seed"]: line for line in one["seeds"] if line["used"] and line["seed"] in seeds}
        for one in (baseline, series)
    )
    lines = []
    for seed, line in second.items():
        if seed in first:
            before = dict(zip(first[seed]["steps"], first[seed]["values"], strict=True))
            at = [i for i, step in enumerate(line["steps"]) if step in before]
            values = np.array([line["values"][i] - before[line["steps"][i]] for i in at])
            costs = {cost: line[cost] and [line[cost][i] for i in at] for cost in COSTS}
            steps = [line["steps"][i] for i in at]
            lines.append(line | {"steps": steps, "values": rounded(values), **costs})
    if not lines:
        return None
    band = _band(lines)
    by_cost = {cost: dict(zip(lines[0]["steps"], lines[0][cost] or [], strict=False)) for cost in COSTS}
    costs = {cost: [at[step] for step in band["steps"]] if at else None for cost, at in by_cost.items()}
    return band | costs | {"seeds": lines}


def _series(lines: list[tuple[Run, np.ndarray, np.ndarray]], split: str, used: set[int]) -> dict[str, Any]:
    grid = thin(np.unique(np.concatenate([steps for _, steps, _ in lines])), MAX_POINTS)
    seeds = []
    for run, steps, values in lines:
        keep = np.isin(steps, grid)
        line: dict[str, Any] = {"seed": run.seed, "used": id(run) in used, "state": run.state}
        seeds.append(line | {"steps": steps[keep].tolist(), "values": rounded(values[keep])})
    band = _band([line for line in seeds if line["used"]])
    source = next((run for run, _, _ in lines if id(run) in used), lines[0][0])
    for cost in COSTS:
        band[cost] = _at(source, split, cost, band["steps"])
        for line in seeds:
            line[cost] = _at(source, split, cost, line["steps"])
    return band | {"seeds": seeds}


def _band(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, lowest and highest over seeds, on the steps that every seed has."""
    if not lines:
        return {"steps": [], "mean": [], "low": [], "high": []}
    common = sorted(set.intersection(*(set(line["steps"]) for line in lines)))
    by_step = [dict(zip(line["steps"], line["values"], strict=True)) for line in lines]
    values = np.array([[line[step] for step in common] for line in by_step], dtype=np.float64)
    return {
        "steps": common,
        "mean": rounded(values.mean(0)),
        "low": rounded(values.min(0)),
        "high": rounded(values.max(0)),
    }


def _first(run: Run, split: str, columns: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    for column in columns:
        steps, values = run.curve(split, column)
        finite = np.isfinite(values)
        if finite.any():
            return steps[finite], values[finite]
    return np.empty(0, np.int64), np.empty(0)


def _at(run: Run, split: str, column: str, steps: list[int]) -> list[float] | None:
    """Cumulative cost at `steps`; None where the run did not record it for each of them."""
    known = dict(zip(*(a.tolist() for a in run.curve(split, column)), strict=True))
    if not known:
        known = dict(zip(*(a.tolist() for a in run.curve("train", column)), strict=True))
    return [known[step] for step in steps] if steps and all(step in known for step in steps) else None


def thin(steps: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` of the sorted `steps`, evenly spread, the first and the last among them."""
    if steps.size <= limit:
        return steps
    return steps[np.unique(np.linspace(0, steps.size - 1, limit).round().astype(int))]


def rounded(values: np.ndarray, digits: int = 6) -> list[Any]:
    """Nested lists with `digits` significant digits: enough to draw and to read, half the bytes."""
    with np.errstate(divide="ignore", invalid="ignore"):
        magnitude = np.floor(np.log10(np.abs(values, dtype=np.float64)))
    scale = 10.0 ** (digits - 1 - np.where(np.isfinite(magnitude), magnitude, 0))
    return (np.round(values * scale) / scale).tolist()
