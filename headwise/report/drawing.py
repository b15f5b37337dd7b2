"""What figures share: colours, axes with margins, tiles. Colours are Okabe and Ito's, safe for all eyes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#666666")
INK, FAINT = "#222222", "#D8D8D8"


def new_figure(
    rows: int, columns: int, width: float, height: float, left: float = 0.6, right: float = 0.15
) -> tuple[Figure, Any]:
    """Axes with margins in inches; matplotlib's own layout engines take longer than the drawing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, bottom=0.55 / height, top=1 - 0.35 / height,
        wspace=(left + 0.1) * columns / (width - left),
    )  # fmt: skip
    return figure, axes


def finish_axis(axis: Axes, title: str, xlabel: str) -> None:
    """Title, label and grid, the same for every figure."""
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel(xlabel, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(color=FAINT, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def mosaic_of(tiles: dict[tuple[int, int], np.ndarray], gap: int = 1) -> tuple[np.ndarray, dict]:
    """One array of all tiles with NaN between them, and the upper left corner of each.

    A single picture instead of an axis a tile: drawing dozens of axes takes seconds.
    """
    rows, columns = (1 + max(at[i] for at in tiles) for i in (0, 1))
    heights = [max((t.shape[0] for at, t in tiles.items() if at[0] == r), default=0) for r in range(rows)]
    widths = [max((t.shape[1] for at, t in tiles.items() if at[1] == c), default=0) for c in range(columns)]
    tops = np.cumsum([0, *(h + gap for h in heights)])
    lefts = np.cumsum([0, *(w + gap for w in widths)])
    mosaic = np.full((int(tops[-1]) - gap, int(lefts[-1]) - gap), np.nan)
    corners = {at: (int(tops[at[0]]), int(lefts[at[1]])) for at in tiles}
    for at, tile in tiles.items():
        top, left = corners[at]
        mosaic[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return mosaic, corners


def picture(
    mosaic: np.ndarray, corners: dict, labels: dict, colours: str, inch: float
) -> tuple[Figure, Axes]:
    """A mosaic with a label above each tile; `inch` is the side of a cell."""
    width, height = (max(2.5, min(14.0, inch * n)) for n in mosaic.shape[::-1])
    figure, axes = new_figure(1, 1, width + 1.8, height + 0.9, right=0.75)
    axis = axes[0][0]
    axis.imshow(mosaic, cmap=colours, interpolation="nearest", aspect="auto")
    for at, (top, left) in corners.items():
        axis.text(left - 0.5, top - 0.6, labels[at], fontsize=7, va="bottom", color=INK)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    return figure, axis
