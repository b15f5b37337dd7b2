"""Tables and figures of head geometry and of its correlation with dynamics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headwise.questions.geometry.correlation import DYNAMICS, REGRESSORS, Heads, Interval, Report
from headwise.report.drawing import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

DOCUMENT_NAMES = {
    "op_norm": "op", "fro_norm": "fro", "trace": "trace", "rank_eff": "rank_eff",
    "spec_entropy": "spec_ent", "anisotropy": "anisotropy", "condition": "condition",
}  # fmt: skip
"""The head geometry note's short names, in its order."""
IN_THIRDS = ("op_norm", "fro_norm", "rank_eff", "spec_entropy", "anisotropy", "condition")

LOGARITHMIC = ("op_norm", "fro_norm", "trace", "condition")
"""Descriptors drawn on a logarithmic scale where they span much."""
FEW_HEADS = 0.3
"""How far r and Spearman's rho may lie apart before a few heads must be suspected behind r."""

LABELS = {
    "op_norm": "op_norm  σ_max", "fro_norm": "fro_norm  √Σσ²", "trace": "trace  Σσ",
    "rank_eff": "rank_eff  Σσ/σ_max", "spec_entropy": "spec_entropy (nats)",
    "anisotropy": "anisotropy  σ_max/mean σ", "condition": "condition  σ_max/σ_min",
    "entropy": "mean entropy (nats)", "logit_std": "mean logit_std",
}  # fmt: skip


def document_tables(report: Report) -> str:
    """The output of the head geometry note, line for line."""
    lines = ["All (layer, head) pairs — Pearson correlation with dynamic entropy:"]
    for name, short in DOCUMENT_NAMES.items():
        entropy, logit_std = (report.pairs[name][dynamic].r for dynamic in ("entropy", "logit_std"))
        lines.append(f"  {short:12} vs entropy: {entropy:+.3f}   vs logit_std: {logit_std:+.3f}")
    lines += ["", "Stratified by layer position (entropy correlation):"]
    for third in report.thirds:
        values = "".join(f"  {DOCUMENT_NAMES[name]}:{third.r[name]:+.2f}" for name in IN_THIRDS)
        lines.append(f"  [{third.name} L{third.first}-{third.last}]{values}")
    lines += ["", "Best single geometric predictor of entropy (abs):"]
    if report.best is None:
        lines.append("  none: no descriptor varies over the heads, or entropy does not")
    else:
        lines.append(f"  {DOCUMENT_NAMES[report.best]}  r = {report.pairs[report.best]['entropy'].r:+.3f}")
    lines += ["", "Linear regression of entropy on multiple descriptors (standardized):"]
    lines += [f"  R² = {report.regression.r2:.3f}", "  standardized coefficients:"]
    for name in REGRESSORS:
        lines.append(f"    {DOCUMENT_NAMES[name]:12} {report.regression.coefficients[name]:+.3f}")
    return "\n".join(lines)


def further_tables(report: Report) -> str:
    """What the head geometry note lacked: intervals, Spearman, Holm, the regression's condition number."""
    layers, heads = report.shape
    n = layers * heads - report.left_out
    lines = [
        f"95% intervals over {n} heads: Fisher's z takes heads as independent; the bootstrap resamples",
        f"the {layers} layers. p of Pearson's r, Holm-corrected over all {2 * len(report.pairs)} pairs.",
        f"  {'':22} {'r':>6}  {'Fisher z':^16} {'bootstrap':^16}  {'Spearman':>8}  {'p':>8}  {'p Holm':>8}",
    ]
    for name, short in DOCUMENT_NAMES.items():
        for dynamic, c in report.pairs[name].items():
            lines.append(
                f"  {short:12} {dynamic:9} {c.r:+.3f}  {_interval(c.fisher)} {_interval(c.bootstrap)}  "
                f"{c.rho:+8.3f}  {c.p:8.2g}  {c.p_holm:8.2g}"
            )
    apart = [
        f"{short} with {dynamic}"
        for name, short in DOCUMENT_NAMES.items()
        for dynamic, c in report.pairs[name].items()
        if abs(c.r - c.rho) > FEW_HEADS
    ]
    if apart:
        lines.append(
            f"r and Spearman lie apart, so a few heads may carry r (see the scatter): {', '.join(apart)}"
        )
    condition = report.regression.condition
    lines += [
        "",
        f"Condition number of the regression's standardised descriptors: {condition:.1f}",
        "  anisotropy · rank_eff = D, so these two are nearly the same variable: far above 10, the",
        "  coefficients trade against each other and only R² can be read.",
    ]
    if report.left_out:
        lines.append(f"{report.left_out} of {layers * heads} heads have an unknown value and are left out.")
    return "\n".join(lines)


def draw_correlation(heads: Heads, report: Report, folder: Path) -> list[Path]:
    """Scatter figures of every descriptor against both dynamics, and heatmaps of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for dynamic in DYNAMICS:
        figure = scatter(heads, report, dynamic)
        made.append(_save(figure, folder / f"geometry_scatter_{dynamic}.png"))
    maps = heads.dynamics | heads.geometry
    made.append(
        _save(
            heatmaps(maps, "Dynamics and query-key geometry of every head"), folder / "geometry_heatmap.png"
        )
    )
    return made


def draw_descriptors(descriptors: dict[str, Array], title: str, path: Path) -> Path:
    """Heatmaps of the descriptors of one circuit, each `(L, H)`."""
    return _save(heatmaps(descriptors, title), path)


def scatter(heads: Heads, report: Report, dynamic: str) -> Figure:
    """One panel per descriptor; a point is a head, its colour the depth of its layer."""
    from matplotlib.ticker import MaxNLocator

    names = list(heads.geometry)
    figure, axes = _grid(len(names), columns=4, width=3.1, height=2.8)
    layers, n_heads = heads.shape
    depth = np.repeat(np.arange(layers), n_heads)
    y = heads.dynamics[dynamic].ravel()
    for axis, name in zip(axes, names, strict=False):
        x = heads.geometry[name].ravel()
        known = np.isfinite(x) & np.isfinite(y)
        points = axis.scatter(x[known], y[known], c=depth[known], cmap="viridis", s=14, linewidths=0, vmin=0,
                              vmax=max(layers - 1, 1))  # fmt: skip
        if name in LOGARITHMIC and _wide(x[known]):
            axis.set_xscale("log")
        c = report.pairs[name][dynamic]
        axis.set_title(f"r = {c.r:+.2f}, p Holm = {c.p_holm:.2g}", fontsize=9, color=INK)
        axis.set_xlabel(LABELS[name], fontsize=9)
    for axis in axes[::4]:
        axis.set_ylabel(LABELS[dynamic], fontsize=9)
    for axis in axes[len(names) :]:
        axis.axis("off")
    legend = figure.colorbar(points, cax=axes[-1].inset_axes((0.0, 0.05, 0.07, 0.9)))
    legend.set_label("layer", fontsize=9)
    legend.ax.tick_params(labelsize=8)
    legend.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"Geometry against {LABELS[dynamic]}, {layers} x {n_heads} heads", fontsize=11, color=INK)
    return figure


def heatmaps(maps: dict[str, Array], title: str) -> Figure:
    """Every measure of every head, `(L, H)` each; layers run downwards."""
    from matplotlib.ticker import MaxNLocator

    columns = min(len(maps), 4)
    layers = next(iter(maps.values())).shape[0]
    height = float(np.clip(0.9 + 0.12 * layers, 2.0, 4.5))
    figure, axes = _grid(len(maps), columns=columns, width=3.2, height=height)
    for axis, (name, values) in zip(axes, maps.items(), strict=False):
        shown, label = values, LABELS.get(name, name)
        if name in LOGARITHMIC and _wide(values[np.isfinite(values)]):
            shown, label = np.log10(np.maximum(values, np.finfo(float).tiny)), f"log10 {label}"
        image = axis.imshow(shown, aspect="auto", cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axis, fraction=0.06).ax.tick_params(labelsize=8)
        axis.set_title(label, fontsize=9, color=INK)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[max(0, len(maps) - columns) : len(maps)]:
        axis.set_xlabel("head", fontsize=9)
    for axis in axes[::columns]:
        axis.set_ylabel("layer", fontsize=9)
    for axis in axes[len(maps) :]:
        axis.axis("off")
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def _grid(panels: int, *, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    rows = -(-panels // columns)
    figure = Figure(figsize=(columns * width, rows * height + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_prop_cycle(color=COLOURS)
    return figure, axes


def _wide(values: Array) -> bool:
    """Whether positive values span so much that only their logarithm can be seen."""
    return bool(values.size and values.min() > 0 and values.max() > 50 * values.min())


def _interval(ends: Interval) -> str:
    text = "-" if np.isnan(ends).any() else f"[{ends[0]:+.3f}, {ends[1]:+.3f}]"
    return f"{text:^16}"


def _save(figure: Figure, path: Path) -> Path:
    from headwise.files import replacing

    with replacing(path) as draft:
        figure.savefig(draft, dpi=130, facecolor="white")
    return path
