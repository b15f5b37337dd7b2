"""How much weight goes to nothing, layer by layer, in the report of a study."""

from __future__ import annotations

from typing import Any

import numpy as np

from headwise.report.drawing import COLOURS, finish_axis, new_figure
from headwise.report.section import Drawn, Found, Section, Titled
from headwise.report.tables import Table


def collect(found: Found) -> list[dict[str, Any]]:
    """Of every run whose heads may attend to nothing: its steps, and the mean weight of each layer."""
    entries = []
    for variant, runs in found.grids.items():
        for run, _, grid in runs:
            if "nothing_weight" in grid["measures"]:
                weight = np.nanmean(grid["measures"]["nothing_weight"], axis=-1)  # (steps, layers)
                entries.append({
                    "variant": variant, "seed": run.seed, "steps": grid["steps"].tolist(),
                    "weight": weight.tolist(),
                })  # fmt: skip
    return entries


def tables(entries: list[dict[str, Any]]) -> list[Titled]:
    """One row a run: the weight on nothing at its last evaluation."""
    layers = max(len(entry["weight"][-1]) for entry in entries)
    rows = [
        [entry["variant"], str(entry["seed"]), *(f"{weight:.1%}" for weight in entry["weight"][-1])]
        for entry in entries
    ]
    headers = ["variant", "seed", *(f"layer {layer}" for layer in range(layers))]
    return [Titled(Table(headers, rows, "Mean over heads and queries at the last evaluation."))]


def figures(entries: list[dict[str, Any]], variants: list[str]) -> list[Drawn]:
    """The mean weight on nothing over training."""
    figure, axes = new_figure(1, 1, 5.0, 3.4)
    axis = axes[0][0]
    for entry in entries:
        colour = COLOURS[variants.index(entry["variant"]) % len(COLOURS)]
        mean = [float(np.mean(layers)) for layers in entry["weight"]]
        axis.plot(entry["steps"], mean, color=colour, label=f"{entry['variant']}, seed {entry['seed']}")
    axis.legend(frameon=False, fontsize=8)
    finish_axis(axis, "weight on nothing", "step")
    return [Drawn(figure, "Weight on nothing over training", "nothing.png")]


NOTHING = Section(
    name="nothing",
    title="Weight on nothing",
    link="Nothing",
    collect=collect,
    tables=tables,
    figures=figures,
)
