"""The report's figures as PNG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.report.drawing import COLOURS, INK, finish_axis, mosaic_of, new_figure, picture
from headwise.report.section import Section
from headwise.report.tables import METRICS, heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EARLY = 0.2
"""Share of training whose loss may leave the picture."""
MAX_SEEDS = 3  # rows of an atlas on paper; the page shows all


def draw(
    data: dict[str, Any],
    maps: dict[str, tuple[Any, list]],
    folder: Path,
    sections: Sequence[Section] = (),
) -> dict[str, str]:
    """Write all figures into `folder` and return title -> file name."""
    folder.mkdir(parents=True)
    made: dict[str, str] = {}

    def save(figure: Figure | None, title: str, name: str) -> None:
        if figure is not None:
            figure.savefig(folder / name, dpi=110, facecolor="white")
            made[title] = name

    save(loss_curves(data), "Loss over training", "loss.png")
    names = [variant["name"] for variant in data["variants"]]
    for section in sections:
        for drawn in section.figures(data[section.name], names) if data[section.name] else ():
            save(*drawn)
    save(comparison(data), "Difference to the baseline", "comparison.png")
    save(costs(data), "Throughput and memory", "costs.png")
    for measure in data["atlas"]["measures"]:
        title = f"{measure['label']} of every head at the last evaluation"
        save(head_atlas(data, measure), title, f"atlas_{measure['name']}.png")
    for variant, (run, prompts) in maps.items():
        title = f"Attention maps of {variant}, seed {run.seed}, first prompt"
        name = f"maps_{re.sub(r'[^A-Za-z0-9_.@=,+-]+', '_', variant)[:100]}"
        taken = [other for other in made.values() if other.startswith(name)]
        save(attention_maps(prompts), title, f"{name}.{len(taken)}.png" if taken else f"{name}.png")
    return made


def loss_curves(data: dict[str, Any]) -> Figure | None:
    """Losses, and how far they are from the baseline's; bands span the seeds."""
    titles = {
        "train": "training loss, smoothed (nats)", "val": "validation loss (nats)",
        "gap": f"validation loss: difference to {data['against']} (nats)", "accuracy": "accuracy",
    }  # fmt: skip
    panels = [panel for panel in titles if any(panel in found for found in data["curves"].values())]
    if not panels:
        return None
    columns = 2 if len(panels) == 4 else len(panels)
    rows = len(panels) // columns
    figure, axes = new_figure(rows, columns, 4.6 * columns, 3.4 * rows)
    figure.subplots_adjust(hspace=0.35)
    for axis, panel in zip(axes.flat, panels, strict=True):
        if panel == "gap":
            axis.axhline(0, color=INK, linewidth=0.8)
        for colour, variant in _coloured(data):
            series = data["curves"].get(variant["name"], {}).get(panel)
            if series:
                _curve(axis, series, colour, variant["name"], band=panel != "gap")
        _leave_out_the_fall(axis)
        finish_axis(axis, titles[panel], "step")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def _leave_out_the_fall(axis: Axes) -> None:
    """Show the values from a fifth of training on: the first fall would dwarf all differences."""
    lines = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata(), dtype=float)) for line in axis.lines]
    lines = [(steps, values) for steps, values in lines if steps.size > 2]
    last = max((steps[-1] for steps, _ in lines), default=0)
    shown = np.concatenate([np.empty(0), *(values[steps >= EARLY * last] for steps, values in lines)])
    if shown.size and np.ptp(shown) > 0:
        pad = 0.08 * np.ptp(shown)
        axis.set_ylim(shown.min() - pad, shown.max() + pad)


def comparison(data: dict[str, Any]) -> Figure | None:
    """Paired differences to the baseline with their simultaneous intervals; small, those of single seeds."""
    metrics = [m for m in ("val_loss", "train_loss") if any(c["metric"] == m for c in data["comparisons"])]
    if not metrics:
        return None
    names = list(dict.fromkeys(c["variant"] for c in data["comparisons"]))
    margin = _margin(names)
    figure, axes = new_figure(1, len(metrics), (3.8 + margin) * len(metrics), 1.2 + 0.4 * len(names), margin)
    colours = {variant["name"]: colour for colour, variant in _coloured(data)}
    for axis, metric in zip(axes[0], metrics, strict=True):
        axis.axvline(0, color=INK, linewidth=0.8)
        for row in (c for c in data["comparisons"] if c["metric"] == metric):
            at, colour = names.index(row["variant"]), colours[row["variant"]]
            if row["n"] > 1:
                axis.plot(
                    row["differences"], [at + 0.22] * row["n"], ".", color=colour, markersize=4, alpha=0.7
                )
            axis.errorbar(
                row["mean"], at, xerr=row["ci95"], fmt="o", capsize=3, color=colour,
            )  # fmt: skip
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        finish_axis(axis, f"{METRICS[metric].label}: difference to {data['against']}", "nats")
    return figure


def costs(data: dict[str, Any]) -> Figure | None:
    """Tokens per second and peak memory of each variant."""
    shown = [m for m in ("tokens_per_sec", "peak_vram_mb", "peak_rss_mb")
             if any(m in v["results"] for v in data["variants"])]  # fmt: skip
    if not shown:
        return None
    variants = [(colour, v) for colour, v in _coloured(data) if v["results"]]
    margin = _margin([v["name"] for _, v in variants])
    figure, axes = new_figure(1, len(shown), (2.6 + margin) * len(shown), 1.2 + 0.4 * len(variants), margin)
    for axis, metric in zip(axes[0], shown, strict=True):
        for row, (colour, variant) in enumerate(variants):
            found = variant["results"].get(metric)
            if found:
                axis.barh(row, found["mean"], xerr=found["ci95"], color=colour, height=0.6, capsize=3)
        axis.set_yticks(range(len(variants)), [v["name"] for _, v in variants])
        axis.invert_yaxis()
        finish_axis(axis, heading(metric), "")
    return figure


def head_atlas(data: dict[str, Any], measure: dict[str, Any]) -> Figure | None:
    """One measure of every head: a column a variant, a row a seed, one colour scale."""
    name = measure["name"]
    columns = {
        variant: [s for s in seeds if name in s["measures"]][:MAX_SEEDS]
        for variant, seeds in data["atlas"]["variants"].items()
    }
    columns = {variant: seeds for variant, seeds in columns.items() if seeds}
    tiles = {
        (row, column): _array(line["measures"][name][-1])
        for column, seeds in enumerate(columns.values())
        for row, line in enumerate(seeds)
    }
    if not any(np.isfinite(tile).any() for tile in tiles.values()):
        return None
    mosaic, corners = mosaic_of(tiles)
    labels = {
        at: f"{variant}, seed {seeds[at[0]]['seed']}{_unless_finished(seeds[at[0]])}"
        for column, (variant, seeds) in enumerate(columns.items())
        for at in corners if at[1] == column
    }  # fmt: skip
    figure, axis = picture(mosaic, corners, labels, "viridis", 0.26)
    axis.images[0].set_clim(*colour_range(mosaic))
    bar = figure.colorbar(axis.images[0], ax=axis, fraction=0.03, pad=0.02, aspect=30)
    bar.ax.tick_params(labelsize=7)
    unit = f" ({measure['unit']})" if measure["unit"] else ""
    bar.set_label(measure["label"] + unit, fontsize=8)
    axis.set_xlabel("head", fontsize=8)
    axis.set_ylabel("layer (first on top)", fontsize=8)
    return figure


def colour_range(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest value, at least 1% of their middle apart on either side.

    Heads that hardly differ, as before training, then look alike rather than like night and day.
    """
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    middle = (low + high) / 2
    half = max((high - low) / 2, 0.01 * abs(middle))
    return middle - half, middle + half


def attention_maps(prompts: list[tuple[list[str], np.ndarray]]) -> Figure | None:
    """Maps of the first prompt, a row a layer, a column a head; colour follows √weight."""
    if not prompts:
        return None
    weights = np.sqrt(np.clip(prompts[0][1], 0, 1))
    tiles = {(layer, head): weights[layer, head] for layer, head in np.ndindex(*weights.shape[:2])}
    mosaic, corners = mosaic_of(tiles, gap=max(2, weights.shape[-1] // 8))
    labels = {(layer, head): f"{layer}.{head}" for layer, head in corners}
    figure, axis = picture(mosaic, corners, labels, "magma", 1.1 / weights.shape[-1])
    axis.set_xlabel("layer.head; rows are queries, columns are keys", fontsize=8)
    return figure


def _curve(axis: Axes, series: dict[str, Any], colour: str, label: str, *, band: bool) -> None:
    """The mean, with a band from the lowest to the highest seed or a thin line for each."""
    if series["steps"]:
        axis.plot(series["steps"], series["mean"], color=colour, label=label, linewidth=1.6)
    if series["steps"] and band:
        axis.fill_between(
            series["steps"], series["low"], series["high"], color=colour, alpha=0.2, linewidth=0
        )
    for line in series["seeds"]:
        if line["used"] and not band:
            axis.plot(line["steps"], line["values"], color=colour, linewidth=0.7, alpha=0.6)
        if not line["used"]:
            name = None if series["steps"] else f"{label} ({line['state']})"
            axis.plot(line["steps"], line["values"], color=colour, ls=":", lw=1.2, label=name)


def _unless_finished(line: dict[str, Any]) -> str:
    return "" if line["used"] else f" ({line['state']})"


def _margin(names: list[str]) -> float:
    """Inches that the longest name needs beside an axis."""
    return 0.25 + 0.075 * max(len(name) for name in names)


def _coloured(data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(COLOURS[i % len(COLOURS)], variant) for i, variant in enumerate(data["variants"])]


def _array(values: list[list[float | None]]) -> np.ndarray:
    return np.array([[np.nan if v is None else v for v in row] for row in values], dtype=np.float64)
