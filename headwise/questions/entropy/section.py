"""The report's tables and figures of entropies: histograms, time series, box plots and correlations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.measures.spec import measure_of
from headwise.questions.entropy.numbers import collect, entropy_log
from headwise.report.drawing import COLOURS, finish_axis, new_figure
from headwise.report.section import Drawn, Section, Titled
from headwise.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 8
"""Variants of a figure; the page and the tables have all."""

PAIRS_NOTE = (
    "Pearson's r with its 95% interval by Fisher's z. The heads of one run depend on each other, and so do "
    "its evaluations, so the interval of a single run is too narrow. Runs with different seeds are "
    "independent; the last columns test the mean of Fisher's z over them. Over evaluations, r mostly shows "
    "that both numbers change during training. A run with fewer than four pairs has no interval."
)


def tables(entries: list[dict[str, Any]]) -> list[Titled]:
    """The correlations, the distribution by layer, and the cost of measuring."""
    found = [Titled(pairs(entries))] if any(entry["pairs"] for entry in entries) else []
    found.append(Titled(spread(entries), "Entropies by layer at the last evaluation", folded=True))
    if any(entry["cost"] for entry in entries):
        found.append(Titled(costs(entries), "Measuring entanglement"))
    return found


def pairs(entries: list[dict[str, Any]]) -> Table:
    """A row for each correlation: r of each run, and the mean over seeds."""
    rows = []
    for entry in entries:
        for pair in entry["pairs"]:
            shown = [_interval(run["r"], run["low"], run["high"]) for run in pair["runs"]]
            over = pair["seeds"]
            many = over["seeds"] > 1
            counts = " / ".join(dict.fromkeys(str(run["n"]) for run in pair["runs"]))
            rows.append([
                entry["variant"], pair["pair"], f"{counts} {pair['over']}", "; ".join(shown),
                _interval(over["r"], over["low"], over["high"]) if many else "one seed",
                f"{over['p']:.3g}" if many and over["p"] is not None else "",
            ])  # fmt: skip
    headers = ["variant", "what", "over", "r of each run", "r over seeds", "p"]
    return Table(headers, rows, PAIRS_NOTE)


def spread(entries: list[dict[str, Any]]) -> Table:
    """The numbers of the box plots: heads of all averaged runs together."""
    rows = [
        [entry["variant"], measure_of(name).label_with_unit, str(layer), str(len(heads)),
         *(f"{q:.4f}" for q in np.percentile(heads, (0, 25, 50, 75, 100)))]
        for entry in entries for name, shown in entry["measures"].items()
        for layer, heads in enumerate(shown["last"]) if heads
    ]  # fmt: skip
    headers = ["variant", "measure", "layer", "heads", "lowest", "25%", "median", "75%", "highest"]
    return Table(headers, rows, "Heads of all averaged seeds together.")


def costs(entries: list[dict[str, Any]]) -> Table:
    """How entanglement was measured and what it cost."""
    rows = []
    for entry in entries:
        if cost := entry["cost"]:
            each = cost["seconds"] / cost["evaluations"] if cost["evaluations"] else None
            rows.append([
                entry["variant"], str(cost["window"]), str(cost["n_windows"]), str(cost["n_regions"]),
                str(cost["every"]), str(cost["evaluations"]), "" if each is None else f"{each:.3f}",
                "" if cost["share"] is None else f"{cost['share']:.1%}",
            ])  # fmt: skip
    headers = ["variant", "window (tokens)", "windows", "regions", "evaluations between", "measured",
               "seconds each", "of the time of training"]  # fmt: skip
    return Table(headers, rows, "Of one run of each variant.")


def figures(entries: list[dict[str, Any]], variants: list[str]) -> list[Drawn]:
    """A figure for each measure, and one of entanglement against sparsity."""
    found = []
    for name in dict.fromkeys(name for entry in entries for name in entry["measures"]):
        having = [entry for entry in entries if name in entry["measures"]][:MOST]
        title = f"{measure_of(name).label}: histogram, over training, and by layer"
        found.append(Drawn(figure(name, having, variants), title, f"spread_{name}.png"))
    if any(entry["points"] for entry in entries):
        found.append(Drawn(scatter(entries, variants), "Entanglement against sparsity", "entanglement.png"))
    return found


def figure(name: str, entries: list[dict[str, Any]], variants: list[str]) -> Figure:
    """A row for each variant: heads at the last evaluation, layers over training, boxes by layer."""
    from matplotlib import colormaps

    drawn, axes = new_figure(len(entries), 3, 11.4, 2.9 * len(entries))
    drawn.subplots_adjust(hspace=0.5)
    for (histogram, series, boxes), entry in zip(axes, entries, strict=True):
        shown = entry["measures"][name]
        colour = COLOURS[variants.index(entry["variant"]) % len(COLOURS)]
        histogram.hist([v for heads in shown["last"] for v in heads], bins=20, color=colour)
        finish_axis(
            histogram, f"{entry['variant']}: heads at the last evaluation", measure_of(name).label_with_unit
        )
        layers = len(shown["last"])
        for line in shown["lines"]:
            for layer, values in enumerate(zip(*line["by_layer"], strict=True)):
                tone = colormaps["viridis"](0.9 * layer / max(1, layers - 1))
                series.plot(line["steps"], values, color=tone, linewidth=1, marker="o", markersize=2)
        finish_axis(series, "mean over heads by layer (dark: the first)", "step")
        boxes.boxplot(shown["last"], positions=range(layers), widths=0.6, medianprops={"color": colour})
        boxes.set_xticks(range(layers), [str(layer) for layer in range(layers)])
        finish_axis(boxes, "heads at the last evaluation", "layer")
    return drawn


def scatter(entries: list[dict[str, Any]], variants: list[str]) -> Figure:
    """Every head at the last evaluation."""
    drawn, axes = new_figure(1, 1, 5.6, 3.8)
    for entry in entries:
        if entry["points"]:
            x, y = zip(*entry["points"], strict=True)
            colour = COLOURS[variants.index(entry["variant"]) % len(COLOURS)]
            axes[0][0].plot(x, y, "o", color=colour, markersize=3, alpha=0.7, label=entry["variant"])
    axes[0][0].legend(frameon=False, fontsize=8)
    finish_axis(axes[0][0], "sparsity of each head", measure_of("entanglement").label_with_unit)
    return drawn


def _interval(r: float | None, low: float | None, high: float | None) -> str:
    if r is None:
        return "not defined"
    return f"{r:+.2f}" if low is None or high is None else f"{r:+.2f} ({low:+.2f} to {high:+.2f})"


ENTROPIES = Section(
    name="entropies",
    title="Entropies of the heads",
    link="Entropies",
    collect=collect,
    tables=tables,
    figures=figures,
    note="Histogram and boxes: every head of the averaged seeds at the last evaluation. Lines: the mean over "
    "the heads of a layer, a line for each layer and seed.",
    exports=entropy_log,
    script=Path(__file__).with_name("section.js"),
)
