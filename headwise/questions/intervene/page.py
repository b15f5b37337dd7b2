"""Tables and figures of interventions: sweeps, gains, the gains of all heads, removed heads."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from headwise.analysis.statistics import summarize
from headwise.files import replacing
from headwise.measures.spec import measure_of
from headwise.questions.intervene.gain import (
    FAILURE_RULE,
    MATHEMATICS,
    Gain,
    flat,
    gain_ratio,
    reading,
    rule_applied,
)
from headwise.questions.intervene.sweep import DIRECTIONS, EXPECTATIONS, MEASURES, Sweep, monotonic
from headwise.report.drawing import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from headwise.questions.intervene.ablate import Removal

COLOUR_OF = {"target": COLOURS[1], "control": COLOURS[0]}
MANY = 24
"""Above so many heads a bar chart is unreadable, and their distribution is drawn instead."""


def expectations(scales: Sequence[float]) -> str:
    """What a sharpening query should do, said before anything is measured."""
    lines = [f"Expected as the scale goes from {min(scales):g} to {max(scales):g}:"]
    lines += [f"  {name:<11} {what}" for name, what in EXPECTATIONS.items()]
    return "\n".join(lines)


def sweep_table(sweep: Sweep) -> str:
    """The query-scaling study's table, with the effect on what the model says."""
    header = f"{'scale':>6}  {'entropy':>8} {'std':>7}  {'max_attn':>8} {'std':>7}  {'k_eff':>8} {'std':>7}"
    effects = [name for name in ("delta_loss", "kl", "output_change") if getattr(sweep, name) is not None]
    titles = {
        "delta_loss": f"{'Δ loss (nats)':>22}",
        "kl": f"{'KL (nats)':>10}",
        "output_change": f"{'Δ output':>9}",
    }
    lines = [f"{sweep.name} ({sweep.head_type}), {sweep.n_tokens:,} tokens"]
    lines.append(header + "".join(f"  {titles[name]}" for name in effects))
    for i, scale in enumerate(sweep.scales):
        mean, std = ({m: of[m][i] for m in MEASURES} for of in (sweep.mean, sweep.std))
        line = f"{scale:>6.2f}  {mean['entropy']:8.4f} {std['entropy']:7.4f}  "
        line += (
            f"{mean['max_weight']:8.4f} {std['max_weight']:7.4f}  {mean['k_eff']:8.2f} {std['k_eff']:7.2f}"
        )
        for name in effects:
            value = getattr(sweep, name)[i]
            if name == "delta_loss":
                half = "" if sweep.delta_loss_ci95 is None else f" ± {sweep.delta_loss_ci95[i]:.1e}"
                line += f"  {f'{value:+.2e}{half}':>22}"
            else:
                line += f"  {value:>10.2e}" if name == "kl" else f"  {value:>9.4f}"
        lines.append(line)
    for name, holds in monotonic(sweep).items():
        ends = sweep.mean[name][-1] - sweep.mean[name][0]
        went = "decreasing" if ends < 0 else "increasing" if ends > 0 else "not moving"
        expected = np.sign(ends) == DIRECTIONS[name]
        verdict = (
            "as expected" if expected and holds else "NOT as expected" if not expected else "not monotonic"
        )
        lines.append(f"  {name:<11} {went}: {verdict}")
    return "\n".join(lines)


def gain_table(gains: Sequence[Gain]) -> str:
    """The gains with both of their uncertainties."""
    lines = ["Gain: slope of mean max_attn against ln(scale)"]
    lines.append(
        f"  {'head':<9}{'':<9}{'gain':>8} {'std err':>8}  {'95% over scales':<19}{'R²':>6}  95% over samples"
    )
    for g in gains:
        over_samples = "-"
        if g.per_sample is not None and g.per_sample.size > 1 and np.isfinite(g.per_sample).all():
            summary = summarize(g.per_sample.tolist())
            over_samples = f"[{summary.low:.4f}, {summary.high:.4f}], n = {summary.n}"
        scales = f"[{g.low:.4f}, {g.high:.4f}]"
        lines.append(
            f"  {g.name:<9}{g.head_type:<9}{g.gain:8.4f} {g.std_error:8.4f}  {scales:<19}{g.r_squared:6.3f}  "
            f"{over_samples}"
        )
    return "\n".join(lines)


def verdict(gains: Sequence[Gain], everyone: Sequence[Gain] = ()) -> str:
    """Each target against each control, the query-scaling study's rule, and its rank among all heads."""
    lines: list[str] = []
    known = everyone or gains
    median = float(np.median([g.gain for g in known]))
    targets = [g for g in gains if g.head_type == "target"]
    controls = [g for g in gains if g.head_type == "control"]
    for target in targets:
        for control in controls:
            ratio = gain_ratio(target, control)
            lines.append(
                f"gain_ratio {target.name} / {control.name} = {ratio.value:.2f}, 95% interval "
                f"[{ratio.low:.2f}, {ratio.high:.2f}] over {ratio.over}: {reading(ratio)}."
            )
    for one in gains if everyone else ():
        below = sum(g.gain < one.gain for g in everyone)
        rank = f"a higher gain than {below} of {len(everyone)} heads"
        lines.append(f"{one.name} has {rank}; the median is {median:.4f}.")
    if not (controls and targets):
        missing = "target" if controls else "control"
        lines.append(
            f"No gain ratio without a {missing}: `headwise intervene gain` compares saved sweeps of both."
        )
    else:
        lines += ["The query-scaling study's failure rule:", _wrapped(FAILURE_RULE)]
        lines += ["What mathematics adds:", _wrapped(MATHEMATICS), "Applied:"]
        lines += [_wrapped(rule_applied(t, c, median)) for t in targets for c in controls]
    flat_heads = [g.name for g in gains if flat(g, median)]
    if flat_heads:
        lines.append(
            f"Flat (interval contains 0, or below 5% of the median head's): {', '.join(flat_heads)}."
        )
    return "\n".join(lines)


def all_heads_table(gains: Sequence[Gain], top: int = 5) -> str:
    """The distribution of gains, and the heads at both of its ends."""
    values = np.array([g.gain for g in gains])
    low, quarter, median, three, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    quartiles = f"quartiles {quarter:.4f} {median:.4f} {three:.4f}"
    lines = [f"Gains of {len(gains)} heads: min {low:.4f}, {quartiles}, max {high:.4f}"]
    ranked = sorted(gains, key=lambda g: g.gain, reverse=True)
    for title, chosen in (("highest", ranked[:top]), ("lowest", ranked[::-1][:top])):
        lines.append(f"  {title}: " + ", ".join(f"{g.name} {g.gain:.4f}" for g in chosen))
    n_flat = sum(flat(g, median) for g in gains)
    lines.append(f"  flat (interval contains 0, or below 5% of the median): {n_flat}")
    return "\n".join(lines)


def draw_sweeps(sweeps: Sequence[Sweep], path: Path) -> Path:
    """The query-scaling study's three panels: entropy, max attention and k_eff against the scale."""
    figure, axes = _figure(3, 4.0, 3.4)
    for axis, name in zip(axes, MEASURES, strict=True):
        for sweep in sweeps:
            colour = COLOUR_OF.get(sweep.head_type, INK)
            style = "-" if sweep.head_type == "target" else "--"
            axis.plot(sweep.scales, sweep.mean[name], style, marker="o", color=colour, label=_legend(sweep))
        axis.axvline(1.0, color="#BBBBBB", linewidth=0.8, zorder=0)
        axis.set_xlabel("query scale", fontsize=9)
        axis.set_xticks(sweeps[0].scales, [f"{s:g}" for s in sweeps[0].scales])
        axis.set_title(
            f"{measure_of(name).label_with_unit}, expected: {EXPECTATIONS[name].split(' (')[0]}",
            fontsize=10,
            color=INK,
        )
    axes[0].legend(frameon=False, fontsize=8)
    return _save(figure, path)


def draw_fit(gain: Gain, sweep: Sweep, path: Path) -> Path:
    """Mean max attention of one head against ln(scale), with the line whose slope is its gain."""
    figure, (axis,) = _figure(1, 4.6, 3.6)
    x = np.log(sweep.scales)
    ends = np.array([x.min(), x.max()])
    colour = COLOUR_OF.get(gain.head_type, INK)
    axis.plot(ends, gain.intercept + gain.gain * ends, color=colour, linewidth=1.5)
    axis.plot(x, sweep.mean["max_weight"], "o", color=colour)
    axis.set_xlabel("ln(query scale)", fontsize=9)
    axis.set_ylabel("mean max attention weight", fontsize=9)
    text = f"gain {gain.gain:.4f} ± {gain.std_error:.4f} (standard error), R² = {gain.r_squared:.3f}"
    axis.set_title(f"{_legend(sweep)}\n{text}", fontsize=9, color=INK)
    return _save(figure, path)


def draw_comparison(gains: Sequence[Gain], path: Path, everyone: Sequence[Gain] = ()) -> Path:
    """Bars of the gains with their 95% intervals; beside them the distribution over all heads, if known."""
    shown = list(gains)[:MANY] or sorted(everyone, key=lambda g: g.gain, reverse=True)[:MANY]
    figure, axes = _figure(2 if everyone else 1, max(4.2, 0.45 * len(shown) + 1.5), 3.8)
    axis = axes[0]
    errors = [g.high - g.gain if np.isfinite(g.high) else 0 for g in shown]
    colours = [COLOUR_OF.get(g.head_type, COLOURS[7]) for g in shown]
    axis.bar(range(len(shown)), [g.gain for g in shown], yerr=errors, capsize=3, color=colours, width=0.6)
    axis.axhline(0, color=INK, linewidth=0.8)
    names = [f"{g.name}\n{g.head_type}" if g.head_type in COLOUR_OF else g.name for g in shown]
    axis.set_xticks(range(len(shown)), names, fontsize=8, rotation=0 if len(shown) <= 8 else 90)
    axis.set_ylabel("gain  d max_attn / d ln(scale)", fontsize=9)
    axis.set_title("gains, 95% intervals over scales", fontsize=10, color=INK)
    if everyone:
        _distribution(axes[1], [g for g in gains if g.head_type in COLOUR_OF], everyone)
    return _save(figure, path)


def draw_all_heads(gains: Sequence[Gain], path: Path) -> Path:
    """Heatmaps of the gain of every head: on max attention, and on entropy."""
    from headwise.questions.geometry.page import heatmaps

    layers, heads = (1 + max(getattr(g, name) for g in gains) for name in ("layer", "head"))
    maps = {name: np.full((layers, heads), np.nan) for name in ("gain", "gain_entropy")}
    for gain in gains:
        for name, values in maps.items():
            values[gain.layer, gain.head] = getattr(gain, name)
    titled = {
        "gain  d max_attn / d ln(scale)": maps["gain"],
        "d entropy / d ln(scale)": maps["gain_entropy"],
    }
    return _save(heatmaps(titled, f"How {len(gains)} heads answer to the scale of their query"), path)


def removal_table(removals: Sequence[Removal], how: str) -> str:
    """What each removal did to the loss, or to the output of a model without one."""
    first = removals[0].effect
    lines = [f"Removed heads (output replaced by {'zero' if how == 'zero' else 'its mean'})"]
    if first.base_loss:
        lines.append(f"  loss of the whole model: {np.mean(first.base_loss):.4f} nats per token")
    names = [n for n in ("delta_loss", "kl", "output_change") if getattr(first, n) is not None]
    width = max(12, *(len(r.name) for r in removals))
    titles = {"delta_loss": "Δ loss (nats) and 95%", "kl": "KL (nats)", "output_change": "Δ output and 95%"}
    lines.append(f"  {'layer.head':<{width}}" + "".join(f"  {titles[name]:>24}" for name in names))
    for removal in removals:
        cells = []
        for name in names:
            half = removal.effect.half_width(name) if name != "kl" else None
            cells.append(f"{removal.effect.mean(name):+.5f}" + ("" if half is None else f" ± {half:.5f}"))
        lines.append(f"  {removal.name:<{width}}" + "".join(f"  {cell:>24}" for cell in cells))
    return "\n".join(lines)


def draw_removals(removals: Sequence[Removal], how: str, path: Path) -> Path:
    """Bars of what each removal costs, with 95% intervals over samples."""
    effect = removals[0].effect
    name = (
        "delta_loss" if effect.delta_loss is not None else "kl" if effect.kl is not None else "output_change"
    )
    label = {
        "delta_loss": "Δ loss (nats per token)",
        "kl": "KL (nats)",
        "output_change": "relative change of the output",
    }[name]
    figure, (axis,) = _figure(1, max(4.2, 0.4 * len(removals) + 1.5), 3.6)
    means = [r.effect.mean(name) or 0.0 for r in removals]
    errors = [r.effect.half_width(name) or 0.0 for r in removals]
    axis.bar(range(len(removals)), means, yerr=errors, capsize=3, color=COLOURS[0], width=0.6)
    axis.axhline(0, color=INK, linewidth=0.8)
    names = [r.name if len(r.heads) < 4 else f"all {len(r.heads)}" for r in removals]
    axis.set_xticks(range(len(removals)), names, fontsize=8, rotation=0 if len(removals) <= 8 else 90)
    axis.set_xlabel("removed layer.head", fontsize=9)
    axis.set_ylabel(label, fontsize=9)
    axis.set_title(f"Removing heads ({how})", fontsize=10, color=INK)
    return _save(figure, path)


def _distribution(axis: Axes, marked: Sequence[Gain], everyone: Sequence[Gain]) -> None:
    from matplotlib.ticker import MaxNLocator

    values = np.array([g.gain for g in everyone])
    axis.hist(values, bins=min(40, max(8, len(values) // 6)), color="#CCCCCC")
    axis.axvline(float(np.median(values)), color=INK, linewidth=1, linestyle=":", label="median")
    for gain in marked:
        axis.axvline(gain.gain, color=COLOUR_OF[gain.head_type], label=f"{gain.name} ({gain.head_type})")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(y=0.35)  # room for the legend
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    axis.set_xlabel("gain", fontsize=9)
    axis.set_ylabel("heads", fontsize=9)
    axis.set_title(f"all {len(values)} heads", fontsize=10, color=INK)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  ")


def _legend(sweep: Sweep) -> str:
    return f"{sweep.name} ({sweep.head_type})"


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panels * width, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as draft:
        figure.savefig(draft, dpi=130, facecolor="white")
    return path
