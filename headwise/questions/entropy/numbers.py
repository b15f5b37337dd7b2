"""Entropy and entanglement of the heads of runs: over training, by layer, and their correlations."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from headwise.analysis.association import fisher_interval
from headwise.analysis.importance import head_correlation, signal
from headwise.measures.spec import WINDOW_MEASURES, measure_of
from headwise.report.atlas import grid_of
from headwise.report.curves import rounded
from headwise.report.section import Found
from headwise.runs.read import Run, Unreadable

SHOWN = ("entropy", "entanglement", "regional_entanglement")
"""Measures with a histogram, a time series and box plots."""

OVER_HEADS = (
    ("entanglement", "sparsity"),
    ("regional_entanglement", "sparsity"),
    ("entropy", "entanglement"),
)
"""Pairs that are correlated over the heads of a run, at its last evaluation."""
OVER_TRAINING = ("entanglement", "regional_entanglement", "entropy")
"""Whose mean over all heads is correlated with the validation loss over the evaluations of a run."""

Grid = dict[str, Any]


def collect(among: Found) -> list[dict[str, Any]]:
    """The section's numbers, one entry per variant; empty if no run has an entropy.

    Returns:
        entries with these keys:
        `measures`: by name, `lines` (of each run the seed, the steps, and the mean over heads by step and
        layer) and `last` (for each layer the values of all heads at the last evaluation);
        `pairs`: the correlations; `points`: entanglement and sparsity of each head; `cost`: what measuring
        entanglement cost.
    """
    found = []
    for name, entries in among.grids.items():
        averaged = [entry for entry in entries if entry[1]] or entries
        grids = [(run, _merged(run, grid)) for run, _, grid in averaged]
        measures = {measure: shown for measure in SHOWN if (shown := _shown(measure, grids))}
        if measures:
            found.append({
                "variant": name, "measures": measures, "pairs": _pairs(grids), "points": _points(grids),
                "cost": next((cost for run, _ in grids if (cost := run.get("entanglement"))), None),
            })  # fmt: skip
    return found


def _merged(run: Run, heads: Grid) -> dict[str, Grid]:
    """For each measure, the grid of values that contains it."""
    windows = _windows(run)
    found = dict.fromkeys(heads["measures"], heads)
    return found if windows is None else found | dict.fromkeys(windows["measures"], windows)


def _windows(run: Run) -> Grid | None:
    try:
        frame = run.entanglement
        return None if frame is None else grid_of(frame)
    except Unreadable:  # the run's other numbers are not touched by it
        return None


def _shown(measure: str, grids: Sequence[tuple[Run, dict[str, Grid]]]) -> dict[str, Any] | None:
    having = [(run, grid[measure]) for run, grid in grids if measure in grid]
    if not having:
        return None
    last: dict[int, list[float]] = {}
    lines = []
    for run, grid in having:
        values = grid["measures"][measure]  # (S, L, H)
        lines.append({
            "seed": run.seed, "steps": grid["steps"].tolist(), "by_layer": rounded(_mean(values, -1)),
        })  # fmt: skip
        for layer, heads in enumerate(values[-1]):
            last.setdefault(layer, []).extend(rounded(heads[np.isfinite(heads)]))
    return {"lines": lines, "last": [last[layer] for layer in sorted(last)]}


def _pairs(grids: Sequence[tuple[Run, dict[str, Grid]]]) -> list[dict[str, Any]]:
    """The correlations of each run, with Fisher's interval, and their mean over the seeds."""
    found = []
    for first, second in OVER_HEADS:
        runs = []
        for run, grid in grids:
            if first in grid and second in grid:
                a, b = (grid[name]["measures"][name][-1] for name in (first, second))
                if a.shape == b.shape:
                    runs.append((run, a.ravel(), b.ravel()))
        found += _pair(f"{_label(first)} and {_lower(second)}", "heads", runs)
    for name in OVER_TRAINING:
        runs = []
        for run, grid in grids:
            if name in grid:
                steps = grid[name]["steps"]
                at = dict(zip(*(x.tolist() for x in run.curve("val", "loss")), strict=True))
                losses = np.array([at.get(step, np.nan) for step in steps.tolist()])
                runs.append((run, _mean(grid[name]["measures"][name], (1, 2)), losses))
        found += _pair(f"{_label(name)} and validation loss", "evaluations", runs)
    return found


def _pair(name: str, over: str, runs: Sequence[tuple[Run, np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
    each = []
    for run, x, y in runs:
        r = head_correlation([x.tolist()], [y.tolist()])
        n = int((np.isfinite(x) & np.isfinite(y)).sum())
        interval = fisher_interval(r, n)
        each.append({"seed": run.seed, "r": r, "n": n, "low": interval and interval[0],
                     "high": interval and interval[1]})  # fmt: skip
    known = {number: one["r"] for number, one in enumerate(each) if one["r"] is not None}
    if not known:
        return []
    return [
        {"pair": name, "over": over, "runs": each, "seeds": asdict(signal(known)) | {"seeds": len(known)}}
    ]


def _points(grids: Sequence[tuple[Run, dict[str, Grid]]]) -> list[list[float]]:
    """Entanglement and sparsity of every head at the last evaluation."""
    points: list[list[float]] = []
    for _, grid in grids:
        if "entanglement" in grid:
            x, y = (
                grid["entanglement"]["measures"][name][-1].ravel() for name in ("entanglement", "sparsity")
            )
            known = np.isfinite(x) & np.isfinite(y)
            points += rounded(np.stack((x[known], y[known]), 1))
    return points


def entropy_log(runs: Sequence[Run]) -> dict[str, str]:
    """`entropy_log.csv`: entropy and the measures of windows by run, step, layer and head.

    A cell is empty if its table has no such row. There is no file if no run has any of these measures.
    """
    names = ("entropy", *WINDOW_MEASURES)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", "variant", "seed", "step", "layer", "head", *names))
    rows = 0
    for run in runs:
        for where, values in _rows(run, names):
            writer.writerow(
                (run.path.as_posix(), run.variant or "", _cell(run.seed), *where, *map(_cell, values))
            )
            rows += 1
    return {"entropy_log.csv": text.getvalue()} if rows else {}


def _rows(run: Run, names: Sequence[str]) -> Iterator[tuple[tuple[int, int, int], list[float | None]]]:
    """`(step, layer, head)` and the value of each measure, in ascending order."""
    cells: dict[tuple[int, int, int], dict[str, float]] = {}
    for table in ("heads", "entanglement"):
        try:
            frame = getattr(run, table)
        except Unreadable:
            continue
        held = [name for name in names if frame is not None and name in frame.columns]
        if not held or frame is None:
            continue
        means = frame.drop_nulls(["step", "layer", "head"]).group_by("step", "layer", "head")
        for step, layer, head, *values in means.agg(_means(held)).iter_rows():
            known = {n: v for n, v in zip(held, values, strict=True) if v is not None and np.isfinite(v)}
            cells.setdefault((step, layer, head), {}).update(known)
    for where in sorted(cells):
        if cells[where]:
            yield where, [cells[where].get(name) for name in names]


def _means(names: Sequence[str]) -> list[Any]:
    import polars as pl

    return [pl.col(name).cast(pl.Float64).fill_nan(None).mean() for name in names]


def _mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """The mean of the finite values; NaN if there are none."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis) / known.sum(axis)


def _label(name: str) -> str:
    return measure_of(name).label


def _lower(name: str) -> str:
    label = _label(name)
    return label[:1].lower() + label[1:]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
