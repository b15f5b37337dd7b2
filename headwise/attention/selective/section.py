"""Selection in a report: the context that masks leave over training, by layer, and what a penalty adds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.analysis.statistics import summarize
from headwise.report.curves import rounded
from headwise.report.drawing import COLOURS, finish_axis, new_figure
from headwise.report.section import Drawn, Found, Section, Titled
from headwise.report.tables import Table
from headwise.runs.read import Run, Unreadable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT = "kept_context"

NOTE = (
    "Kept context of a query: M = Σ_j (1 - min(F, 1)) over the keys it sees; mean over queries, sequences "
    "and heads, as a share of the mean number of visible keys, (T + 1) / 2."
)


def collect(among: Found) -> list[dict[str, Any]]:
    """The kept context of each variant whose heads mask keys; empty where none does.

    Returns:
        per variant: lines, of each run the seed, the steps, and kept, the share of the context by step
        and layer; last, for each layer a summary over runs with the lowest and the highest; all, a summary of
        the mean over layers; terms, `{loss, penalty}` where there was one.
    """
    found = []
    curves = among.curves
    for name, runs in among.grids.items():
        having = [entry for entry in runs if KEPT in entry[2]["measures"]]
        averaged = [entry for entry in having if entry[1]]
        shares = [(run.seed, grid["steps"], _share(run, grid)) for run, _, grid in averaged or having]
        lines = [(seed, steps, share) for seed, steps, share in shares if share is not None]
        if lines:
            penalty = curves.get(name, {}).get("penalty")
            terms = penalty and {"loss": curves[name].get("train"), "penalty": penalty}
            found.append(_entry(name, lines, bool(averaged)) | {"terms": terms})
    return found


def _share(run: Run, grid: dict[str, Any]) -> np.ndarray | None:
    """Kept context as a share of the visible keys, `(S, L)`; None where the run does not tell its length."""
    length = run.get("seq_len") or _configured(run)
    return None if not length else grid["measures"][KEPT].mean(-1) / ((int(length) + 1) / 2)


def _configured(run: Run) -> Any:
    try:
        return run.config.get("data", {}).get("seq_len")
    except (Unreadable, AttributeError):
        return None


def _entry(
    name: str, lines: list[tuple[int | None, np.ndarray, np.ndarray]], averaged: bool
) -> dict[str, Any]:
    last = np.stack([share[-1] for _, _, share in lines])  # (runs, L)
    return {
        "variant": name, "averaged": averaged, "n": len(lines),
        "lines": [
            {"seed": seed, "steps": steps.tolist(), "kept": rounded(share)} for seed, steps, share in lines
        ],
        "last": [
            asdict(summarize(layer)) | {"low": layer.min().item(), "high": layer.max().item()}
            for layer in last.T
        ],
        "all": asdict(summarize(last.mean(1))),
    }  # fmt: skip


def table(entries: list[dict[str, Any]]) -> Table:
    """One row a variant: the share of the context that is kept at the last evaluation, layer by layer."""
    layers = max((len(entry["last"]) for entry in entries), default=0)
    rows = [
        [entry["variant"], str(entry["n"]), _percent(entry["all"]), *_layers(entry),
         *("" for _ in range(layers - len(entry["last"])))]
        for entry in entries
    ]  # fmt: skip
    headers = ["variant", "n", "all layers", *(f"layer {layer}" for layer in range(layers))]
    note = "Last evaluation, mean ± half-width of the 95% interval over seeds; by layer (lowest – highest)."
    return Table(headers, rows, f"{NOTE} {note}")


def figures(entries: list[dict[str, Any]], variants: list[str]) -> list[Drawn]:
    """The kept context over training."""
    return [Drawn(figure(entries, variants), "Context kept per layer over training", "kept_context.png")]


def figure(entries: list[dict[str, Any]], variants: list[str]) -> Figure:
    """A panel a variant with a line a layer and run, and one of both loss terms where there is a penalty.

    Args:
        variants: the names of all variants, which decide the colours.
    """
    from matplotlib import colormaps

    penalised = [entry for entry in entries if entry["terms"]]
    count = len(entries) + bool(penalised)
    columns = min(3, count)
    rows = -(-count // columns)
    drawn, axes = new_figure(rows, columns, 3.9 * columns, 3.2 * rows)
    drawn.subplots_adjust(hspace=0.42)
    top = max(share for entry in entries for line in entry["lines"] for row in line["kept"] for share in row)
    for axis, entry in zip(axes.flat, entries, strict=False):
        layers = len(entry["last"])
        for number, line in enumerate(entry["lines"]):  # a mean would hide that seeds differ in the layer
            for layer, values in enumerate(zip(*line["kept"], strict=True)):
                axis.plot(
                    line["steps"], values, color=colormaps["viridis"](0.9 * layer / max(1, layers - 1)),
                    marker="o", markersize=2.5, linewidth=1, label=None if number else str(layer),
                )  # fmt: skip
        axis.set_ylim(0, 1.05 * top)
        axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        finish_axis(axis, f"context kept: {entry['variant']}", "step")
        axis.legend(frameon=False, fontsize=7, title="layer", title_fontsize=7, ncols=-(-layers // 6))
    if penalised:
        axis = axes.flat[len(entries)]
        for entry in penalised:
            colour = COLOURS[variants.index(entry["variant"]) % len(COLOURS)]
            for term, dash in (("loss", "-"), ("penalty", "--")):
                line = entry["terms"][term]
                if line and line["steps"]:
                    axis.plot(line["steps"], line["mean"], dash, color=colour,
                              label=f"{entry['variant']}: {term}")  # fmt: skip
        axis.set_yscale("log")
        finish_axis(axis, "loss terms (nats): training loss, penalty", "step")
        axis.legend(frameon=False, fontsize=7)
    for axis in axes.flat[count:]:
        axis.remove()
    return drawn


def _layers(entry: dict[str, Any]) -> list[str]:
    """What is left in each layer: seeds may differ in which layer keeps its context, so no interval."""
    if entry["n"] == 1:
        return [f"{layer['mean']:.1%}" for layer in entry["last"]]
    return [f"{layer['mean']:.1%} ({layer['low']:.1%} – {layer['high']:.1%})" for layer in entry["last"]]


def _percent(summary: dict[str, Any]) -> str:
    if summary["mean"] is None:
        return ""
    text = f"{summary['mean']:.1%}"
    return text if summary["ci95"] is None else f"{text} ± {summary['ci95']:.1%}"


KEPT_CONTEXT = Section(
    name="selection",
    title="Context kept by selection",
    link="Kept context",
    collect=collect,
    tables=lambda entries: [Titled(table(entries))],
    figures=figures,
    note="A line for each layer and seed: seeds may differ in the layer that keeps its context. Click a "
    "layer in the legend to hide it.",
    script=Path(__file__).with_name("section.js"),
)
