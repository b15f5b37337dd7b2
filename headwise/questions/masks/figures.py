"""Figures of `headwise masks`: the prompt under each mask, F of every query and key, and the answers."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.questions.masks.numbers import EDGES
from headwise.report.drawing import FAINT, INK, finish_axis, mosaic_of, new_figure, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from headwise.questions.masks.selection import Selection

WIDTH = 64
"""Tokens in a line of the prompt, where it has no earlier end."""
PANELS = 8
"""Masks that the prompt is drawn under, and maps of a layer; the page has all of them."""
SIDE = 12.0
"""Inches that maps take at most, either way."""


def draw(data: dict[str, Any], layers: list[Selection]) -> dict[str, Figure]:
    """Every figure by its name."""
    return {"tokens": tokens(data, layers), "maps": maps(data, layers), "answers": answers(data)}


def tokens(data: dict[str, Any], layers: list[Selection]) -> Figure:
    """The prompt under the masks, darker where more of a token is taken by the end."""
    from matplotlib.figure import Figure

    views = [
        (f"layer {one.layer}, mask {mask}{label}", f[mask])
        for one in layers for mask in range(len(one.taken))
        for label, f in _versions(one)
    ][:PANELS]  # fmt: skip
    lines = _lines(data["tokens"])
    width = max(sum(max(1, len(data["tokens"][place])) for place in line) for line in lines)
    rows, columns = -(-len(views) // 2), min(2, len(views))
    size = max(4.6, 0.118 * width)
    text, title_room = 0.17 * len(lines), 0.35
    height = rows * (text + title_room) + 0.1
    drawn = Figure(figsize=(size * columns, height))
    axes = drawn.subplots(rows, columns, squeeze=False)
    drawn.subplots_adjust(
        left=0.01, right=0.99, bottom=0.1 / height, top=1 - title_room / height,
        wspace=0.02, hspace=title_room / text,
    )  # fmt: skip
    for axis, (title, taken) in zip(axes.flat, views, strict=False):
        _prompt(axis, lines, data["tokens"], np.clip(taken[-1], 0, 1), size / 0.118)
        axis.set_title(f"{title}: what is taken of each token by the end", fontsize=8, loc="left", color=INK)
    for axis in axes.flat[len(views) :]:
        axis.remove()
    return drawn


def maps(data: dict[str, Any], layers: list[Selection]) -> Figure:
    """min(F, 1), rows queries and columns keys: a row a layer, a column a mask, as far as there is room."""
    tiles, labels = {}, {}
    for row, one in enumerate(layers):
        versions = _versions(one)
        for mask in range(min(len(one.taken), PANELS // len(versions))):
            for side, (label, f) in enumerate(versions):
                at = (row, mask * len(versions) + side)
                tiles[at] = np.where(np.tri(len(f[mask]), dtype=bool), np.clip(f[mask], 0, 1), np.nan)
                labels[at] = f"{one.layer}.{mask}{label}"
    size = len(data["tokens"])
    mosaic, corners = mosaic_of(tiles, gap=max(3, size // 8))
    figure, axis = picture(mosaic, corners, labels, "magma", min(2.6 / size, SIDE / max(mosaic.shape)))
    axis.images[0].set_clim(0, 1)
    bar = figure.colorbar(axis.images[0], ax=axis, fraction=0.03, pad=0.02, aspect=30)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("min(F, 1): bright is masked", fontsize=8)
    axis.set_xlabel("layer.mask; rows are queries, columns are keys", fontsize=8)
    return figure


def answers(data: dict[str, Any]) -> Figure:
    """How far back masking reaches, by layer, and what F tokens end with."""
    from matplotlib import colormaps

    figure, axes = new_figure(1, 3, 13.2, 3.4)
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(data["layers"])))
    for axis, kind, title in (
        (axes[0][0], "effect", "strength lost to queries within this distance"),
        (axes[0][1], "attack", "attack within this distance"),
    ):
        for one, shade in zip(data["layers"], shades, strict=True):
            if one["all"][kind]:
                label = f"layer {one['layer']}" if kind == "effect" else None
                _cumulative(axis, one["all"][kind]["shares"], color=shade, label=label)
        if kind == "attack":
            _cumulative(axis, data["alike"]["shares"], color=INK, ls="--", lw=1, label="all keys alike")
        axis.axvline(data["near"], color=FAINT, linewidth=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda d, _: f"{d:g}")
        axis.set_ylim(0, 1.02)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
        finish_axis(axis, title, "distance from query to key (tokens)")
    axis = axes[0][2]
    bins = np.arange(len(EDGES))
    width = 0.8 / len(data["layers"])
    for n, (one, shade) in enumerate(zip(data["layers"], shades, strict=True)):
        axis.bar(bins - 0.4 + width * (n + 0.5), one["all"]["histogram"] or 0, width, color=shade,
                 label=f"layer {one['layer']}")  # fmt: skip
    axis.set_xticks(bins, bin_labels(), rotation=40, ha="right")
    finish_axis(axis, "share of tokens by F at the end", "")
    return figure


def bin_labels() -> list[str]:
    """The bins of F in words."""
    ends = [f"{low:g}–{high:g}" for low, high in pairwise(EDGES)]
    return [*ends, f"≥ {EDGES[-1]:g}"]


def _versions(one: Selection) -> list[tuple[str, np.ndarray]]:
    if one.unprotected is None:
        return [("", one.taken)]
    return [(", protected", one.taken), (", without", one.unprotected)]


def _cumulative(axis: Axes, shares: list[float], **style: Any) -> None:
    axis.plot(np.arange(1, len(shares)), np.cumsum(shares)[1:], **style)


def _lines(labels: list[str]) -> list[list[int]]:
    """Places of the tokens, line by line: a line ends with its newline or when it is full."""
    lines: list[list[int]] = [[]]
    width = 0
    for place, label in enumerate(labels):
        if width + len(label) > WIDTH and lines[-1]:
            lines.append([])
            width = 0
        lines[-1].append(place)
        width += len(label)
        if label.endswith("⏎"):
            lines.append([])
            width = 0
    return [line for line in lines if line]


def _prompt(axis: Axes, lines: list[list[int]], labels: list[str], taken: np.ndarray, columns: float) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    for row, line in enumerate(lines):
        x = 0
        for place in line:
            label = labels[place]
            width = max(1, len(label))
            shade = colormaps["Oranges"](0.85 * float(taken[place]))
            axis.add_patch(Rectangle((x, row + 0.05), width, 0.9, color=shade, linewidth=0))
            ink = "#FFFFFF" if taken[place] > 0.75 else INK
            axis.text(x + width / 2, row + 0.55, label, ha="center", va="center", fontsize=7.5,
                      family="monospace", color=ink, parse_math=False)  # fmt: skip
            x += width
    axis.set_xlim(0, columns)
    axis.set_ylim(len(lines), 0)
    axis.axis("off")
