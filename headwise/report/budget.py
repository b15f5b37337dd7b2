"""The report of `headwise budget`: Markdown, a self-contained page, figure, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.report.collect import finite
from headwise.report.drawing import COLOURS, INK, finish_axis, new_figure
from headwise.report.html import embedded
from headwise.report.markdown import _table, sentence
from headwise.report.tables import Table
from headwise.storage.atomic import replacing, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STROKES = {"kept": "-", "window": "-", "chosen afresh": ":", "per layer": "--"}
ABOUT = {
    "kept": "a key is dropped for good when there are more than the budget: the one with the largest F",
    "window": "the last keys are held; there is no F",
    "chosen afresh": "every query chooses among all keys anew, which no cache can do (as document 002 did)",
    "per layer": "a key is dropped for good, under a budget for each layer; their mean is the budget",
}


def write(data: dict[str, Any], out: Path) -> dict[str, Path]:
    """Write all files into `out` and return their paths by kind.

    Args:
        data: what `headwise.lab.budget.measure` returned.
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
    from jinja2 import Environment, PackageLoader
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("headwise.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["json"] = embedded
    variants = list(dict.fromkeys(one["variant"] for one in data["series"]))
    return environment.get_template("budget.html.j2").render(
        data=data | {"variants": [{"name": name} for name in variants]},
        facts=_facts(data),
        statements=statements(data),
        sentence=sentence,
        tables=[("Numbers", table(data)), ("Budgets of layers", layers(data))],
        about=_about(data),
        plotly=get_plotlyjs(),
    )


def figure(data: dict[str, Any]) -> Figure:
    """Every curve against the share of the context; bars are 95% intervals over seeds."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    drawn, axes = new_figure(1, 1, 7.2, 4.4, left=0.75)
    axis = axes[0][0]
    variants = list(dict.fromkeys(one["variant"] for one in data["series"]))
    budgets = sorted({point["budget"] for one in data["series"] for point in one["points"]})
    if data["baseline"]:
        axis.axhline(data["baseline"]["mean"], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.annotate(
            f"{data['baseline']['name']}, full context", (1, data["baseline"]["mean"]),
            xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", ha="right",
            fontsize=8, color=INK,
        )  # fmt: skip
    for one in data["series"]:
        colour = COLOURS[variants.index(one["variant"]) % len(COLOURS)]
        shares, means = ([point[name] for point in one["points"]] for name in ("budget", "mean"))
        axis.errorbar(
            shares, means, yerr=[point["ci95"] or 0 for point in one["points"]], label=one["name"],
            color=colour, linestyle=STROKES[one["method"]], marker="o", markersize=4, lw=1.6, capsize=3,
        )  # fmt: skip
        parity = one["parity"]
        if parity and parity["share"] is not None:
            share = parity["share"]
            low, high = parity["low"] or share, parity["high"] or share
            axis.errorbar(
                share, data["baseline"]["mean"], xerr=[[share - low], [high - share]], color=colour,
                marker="D", markersize=6, markerfacecolor="white", capsize=3, zorder=5,
            )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(budgets))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
    axis.set_xlim(max(budgets) * 1.12, min(budgets) / 1.12)
    finish_axis(axis, "validation loss (nats per token)", "share of the context kept (log scale)")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    return drawn


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
