"""The report of `headwise budget`: Markdown, a self-contained page, figure, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.files import replacing, write_json, write_text
from headwise.report.collect import finite
from headwise.report.drawing import COLOURS, INK, finish_axis, new_figure
from headwise.report.html import templates
from headwise.report.markdown import _table, sentence
from headwise.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAR = 0.15
"""Share of the baseline's loss by which a curve may rise above it within the picture."""
TITLES = {
    "kept": "one budget for all layers", "per layer": "a budget for each layer",
    "chosen afresh": "keys chosen afresh", "window": "a window",
}  # fmt: skip
ABOUT = {
    "kept": "a key is dropped for good when there are more than the budget: the one with the largest F",
    "window": "the last keys are held; there is no F",
    "chosen afresh": "every query chooses anew, which no cache can do (as the selective attention log did)",
    "per layer": "a key is dropped for good, under a budget for each layer; their mean is the budget",
}


def write(data: dict[str, Any], out: Path) -> dict[str, Path]:
    """Write all files into `out` and return their paths by kind.

    Args:
        data: what `headwise.questions.budget.measure.measure` returned.
    """
    out.mkdir(parents=True, exist_ok=True)
    data = finite(data)
    paths = {kind: out / f"budget.{kind}" for kind in ("md", "html", "json", "csv", "png")}
    with replacing(paths["png"]) as draft:
        figure(data).savefig(draft, dpi=130, facecolor="white", format="png")
    write_json(paths["json"], data)
    write_text(paths["csv"], _csv(data))
    write_text(paths["md"], markdown(data))
    write_text(paths["html"], html(data))
    return paths


def statements(data: dict[str, Any]) -> list[str]:
    """What was found: a sentence on the parity of each curve, or why there is none."""
    if data["baseline"] is None:
        return ["No baseline was named, so no point of parity: give --baseline RUN."]
    found = [one for one in data["series"] if one["parity"]]
    return [f"{one['parity']['text']}." for one in found] + _beside_a_window(data, found)


def _beside_a_window(data: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    """What the baseline loses with a plain window as small as the smallest point of parity."""
    shares = [one["parity"]["share"] for one in found if one["parity"]["share"] is not None]
    name = data["baseline"]["name"]
    for one in data["series"]:
        narrow = [point for point in one["points"] if shares and point["budget"] >= min(shares)]
        if one["variant"] == name and one["method"] == "window" and narrow:
            point = min(narrow, key=lambda point: point["budget"])
            return [
                f"For comparison: {name} itself, with a plain window of {point['budget']:g} of the context, "
                f"is {_with_interval(point['difference'], '+')} nats off its full context."
            ]
    return []


def table(data: dict[str, Any]) -> Table:
    """A row for each curve and budget."""
    against = data["baseline"]["name"] if data["baseline"] else None
    headers = ["curve", "budget", "keys held", "loss (nats)", "seeds"]
    headers += [f"difference to {against}, full context"] if against else []
    rows = []
    for one in data["series"]:
        for point in one["points"]:
            row = [one["name"], f"{point['budget']:g}", f"{point['keys']:,}", _with_interval(point, "")]
            row.append(str(point["n"]))
            if against:
                row.append(_with_interval(point["difference"], "+"))
            rows.append(row)
    note = f"Mean over seeds ± half-width of its 95% interval; differences are paired by seed. " \
           f"Of {data['seq_len']:,} tokens."  # fmt: skip
    return Table(headers, rows, note)


def layers(data: dict[str, Any]) -> Table:
    """Shares of each layer, where they were chosen; one row for each curve, seed and budget."""
    rows = [
        [one["name"], seed, f"{point['budget']:g}", " ".join(f"{share:.3g}" for share in shares)]
        for one in data["series"]
        for point in one["points"]
        for seed, shares in point.get("layers", {}).items()
    ]
    note = (
        f"From the first layer to the last; chosen on {data['calibration']} validation sequences: lowered "
        "again and again was the layer whose loss rises least for each share that it gives up."
    )
    return Table(["curve", "seed", "mean budget", "share of each layer"], rows, note)


def markdown(data: dict[str, Any]) -> str:
    """The report as Markdown."""
    blocks = [f"# {data['title']}", "\n".join(f"- {name}: {value}" for name, value in _facts(data))]
    blocks += ["## Parity", "\n".join(f"- {line}" for line in statements(data))]
    if data["notes"]:
        blocks += ["## Notes", "\n".join(f"- {sentence(note)}" for note in data["notes"])]
    blocks += ["![Loss against the share of the context kept](budget.png)", "## Numbers", _table(table(data))]
    if layers(data).rows:
        blocks += ["## Budgets of layers", _table(layers(data))]
    blocks += ["## How keys are chosen", "\n".join(f"- {name}: {text}." for name, text in _about(data))]
    return "\n\n".join(blocks) + "\n"


def html(data: dict[str, Any]) -> str:
    """The report as one page that works offline."""
    from plotly.offline import get_plotlyjs

    variants = list(dict.fromkeys(one["variant"] for one in data["series"]))
    return (
        templates()
        .get_template("budget.html.j2")
        .render(
            data=data
            | {
                "variants": [{"name": name} for name in variants],
                "panels": panels(data),
                "shown": shown(data),
            },
            facts=_facts(data),
            statements=statements(data),
            sentence=sentence,
            tables=[("Numbers", table(data)), ("Budgets of layers", layers(data))],
            about=_about(data),
            plotly=get_plotlyjs(),
        )
    )


def panels(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Title -> curves, by how keys are chosen; windows beside all of them."""
    methods = dict.fromkeys(one["method"] for one in data["series"])
    windows = [one for one in data["series"] if one["method"] == "window"]
    found = {
        TITLES[method]: windows + [one for one in data["series"] if one["method"] == method]
        for method in methods
        if method != "window"
    }
    return found or {TITLES["window"]: windows}


def height(point: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What a picture shows of a point: its difference to the baseline, or its loss where there is none."""
    return point["difference"] if data["baseline"] else point


def shown(data: dict[str, Any]) -> tuple[float, float] | None:
    """Lowest and highest difference of a picture; None where losses are shown."""
    if not data["baseline"]:
        return None
    points = [point["difference"] for one in data["series"] for point in one["points"]]
    ends = [
        (p["mean"] - (p["ci95"] or 0), p["mean"] + (p["ci95"] or 0)) for p in points if p["mean"] is not None
    ]
    low, high = min((end[0] for end in ends), default=0.0), max((end[1] for end in ends), default=0.0)
    low, high = min(low, 0.0), max(0.0, min(high, FAR * data["baseline"]["mean"]))
    pad = 0.06 * (high - low) or 1e-3
    return low - pad, high + pad


def figure(data: dict[str, Any]) -> Figure:
    """Every curve against the share of the context, a panel for each way to choose keys."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    variants = list(dict.fromkeys(one["variant"] for one in data["series"]))
    budgets = sorted({point["budget"] for one in data["series"] for point in one["points"]})
    name = data["baseline"] and data["baseline"]["name"]
    ylabel = (
        f"validation loss: difference to {name}, full context (nats)" if name else "validation loss (nats)"
    )
    beside, heights = panels(data), shown(data)
    drawn, axes = new_figure(1, len(beside), 5.2 * len(beside), 4.2, left=0.75)
    for axis, (title, series) in zip(axes[0], beside.items(), strict=True):
        if name:
            axis.axhline(0, color=INK, linewidth=0.8)
        for one in series:
            at = variants.index(one["variant"])
            _draw(axis, one, data, COLOURS[at % len(COLOURS)], 1.012 ** (at - len(variants) / 2))
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(budgets))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
        axis.set_xlim(max(budgets) * 1.12, min(budgets) / 1.12)
        axis.set_ylim(heights)
        finish_axis(axis, f"{ylabel}\n{title}", "share of the context kept (log scale)")
    lines = axes[0][0].get_legend_handles_labels()
    rows = -(-len(lines[0]) // (4 * len(axes[0])))
    drawn.legend(*lines, frameon=False, fontsize=8, loc="lower center", ncols=4 * len(axes[0]))
    drawn.subplots_adjust(top=0.88, bottom=0.14 + 0.05 * rows)
    return drawn


def _draw(axis: Axes, one: dict[str, Any], data: dict[str, Any], colour: str, aside: float) -> None:
    """A curve with its intervals and its point of parity; `aside` keeps intervals apart."""
    found = [(point["budget"] * aside, height(point, data)) for point in one["points"]]
    found = [(share, value) for share, value in found if value["mean"] is not None]
    axis.errorbar(
        [share for share, _ in found], [value["mean"] for _, value in found],
        yerr=[value["ci95"] or 0 for _, value in found], color=colour, label=one["name"],
        linestyle=":" if one["method"] == "window" else "-", marker="o", markersize=3.5, lw=1.4, capsize=2.5,
        elinewidth=0.9,
    )  # fmt: skip
    parity = one["parity"]
    if parity and parity["share"] is not None:
        share = parity["share"]
        low, high = parity["low"] or share, parity["high"] or share
        axis.errorbar(
            share, 0, xerr=[[share - low], [high - share]], color=colour, marker="D", markersize=6,
            markerfacecolor="white", capsize=3, zorder=5,
        )  # fmt: skip


def _facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        (
            "Data",
            f"{data['data']}, validation split, {data['sequences']} sequences of {data['seq_len']} tokens",
        ),
        ("Baseline", data["baseline"]["name"] if data["baseline"] else "none"),
        ("Written", data["written"]),
    ]
    return [(name, str(value)) for name, value in facts]


def _about(data: dict[str, Any]) -> list[tuple[str, str]]:
    methods = dict.fromkeys(one["method"] for one in data["series"])
    return [(method, ABOUT[method]) for method in methods]


def _with_interval(found: dict[str, Any], sign: str) -> str:
    if found["mean"] is None:
        return "no common seed"
    text = format(round(found["mean"], 4) + 0.0, f"{sign}.4f")
    return text if found["ci95"] is None else f"{text} ± {found['ci95']:.4f}"


def _csv(data: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["curve", "variant", "kind", "method", "seed", "budget", "keys", "loss", "layers"])
    for one in data["series"]:
        for point in one["points"]:
            for seed, loss in point["losses"].items():
                shares = json.dumps(point["layers"][seed]) if "layers" in point else ""
                about = [one["name"], one["variant"], one["kind"], one["method"]]
                writer.writerow([*about, seed, point["budget"], point["keys"], loss, shares])
    return text.getvalue()
