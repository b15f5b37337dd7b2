"""Margins in a report: the robustness of the winners of each tropical head, at the end and over training."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.analysis.statistics import summarize
from headwise.report.curves import rounded
from headwise.report.drawing import COLOURS, finish_axis, new_figure
from headwise.report.section import Drawn, Found, Section, Titled
from headwise.report.tables import Table, fixed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEAN, LEAST = "margin", "margin_min"

NOTE = (
    "γ of a query: the smallest difference over channels between the best key's offer and the second best's. "
    "Values that move by less than γ/2 change no winner. Mean over the finite γ of tokens and samples at the "
    "last evaluation, then mean, standard deviation and half-width of the 95% interval over seeds; "
    "gamma_min: the smallest of all tokens, samples and seeds."
)


def collect(found: Found) -> list[dict[str, Any]]:
    """The margins of each variant's heads at the end, and their mean over training.

    Returns:
        per variant: heads, `{layer, head, n, mean, std, ci95, least}`; lines, of each run the seed, the
        steps and the mean γ over layers and heads.
    """
    entries = []
    for variant, runs in found.grids.items():
        having = [entry for entry in runs if MEAN in entry[2]["measures"]]
        having = [entry for entry in having if entry[1]] or having
        if having:
            grids = [grid for _, _, grid in having]
            entries.append({
                "variant": variant, "heads": _heads([grid["measures"] for grid in grids]),
                "lines": [
                    {"seed": run.seed, "steps": grid["steps"].tolist(),
                     "margin": rounded(_mean(grid["measures"][MEAN]))}
                    for run, _, grid in having
                ],
            })  # fmt: skip
    return entries


def _heads(runs: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """One row a layer and head of arrays `(steps, layers, heads)`; heads that some run lacks are left out."""
    layers, heads = (min(run[MEAN].shape[axis] for run in runs) for axis in (1, 2))
    rows = []
    for layer, head in np.ndindex(layers, heads):
        values = [float(run[MEAN][-1, layer, head]) for run in runs]
        known = [value for value in values if np.isfinite(value)]
        least = [float(run[LEAST][-1, layer, head]) for run in runs if LEAST in run]
        least = [value for value in least if np.isfinite(value)]
        if known:
            rows.append(
                {"layer": layer, "head": head}
                | asdict(summarize(known))
                | {"least": min(least, default=None)}
            )
    return rows


def _mean(margins: np.ndarray) -> np.ndarray:
    """The mean over layers and heads, by step; NaN where none has a margin."""
    flat = margins.reshape(len(margins), -1)
    known = np.isfinite(flat)
    count = known.sum(1)
    mean: np.ndarray = np.where(count > 0, np.where(known, flat, 0).sum(1) / np.maximum(count, 1), np.nan)
    return mean


def table(entries: list[dict[str, Any]]) -> Table:
    """One row a variant, layer and head."""
    rows = [
        [entry["variant"], str(row["layer"]), str(row["head"]), str(row["n"]),
         *(fixed(row[key]) for key in ("mean", "std", "ci95", "least"))]
        for entry in entries
        for row in entry["heads"]
    ]  # fmt: skip
    headers = ["variant", "layer", "head", "n", "gamma_mean", "std", "ci95", "gamma_min"]
    return Table(headers, rows, NOTE)


def figure(entries: list[dict[str, Any]], variants: list[str]) -> Figure:
    """The mean γ over training, a line a run."""
    drawn, axes = new_figure(1, 1, 5.0, 3.4)
    axis = axes.flat[0]
    for entry in entries:
        colour = COLOURS[variants.index(entry["variant"]) % len(COLOURS)]
        for number, line in enumerate(entry["lines"]):
            label = None if number else entry["variant"]
            axis.plot(line["steps"], line["margin"], color=colour, marker="o", markersize=2.5, label=label)
    axis.legend(frameon=False, fontsize=8)
    finish_axis(axis, "mean margin γ", "step")
    return drawn


MARGINS = Section(
    name="margins",
    title="Tropical margins",
    link="Margins",
    collect=collect,
    tables=lambda entries: [Titled(table(entries))],
    figures=lambda entries, variants: [
        Drawn(figure(entries, variants), "Tropical margins over training", "margins.png")
    ],
)
