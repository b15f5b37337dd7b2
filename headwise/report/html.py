"""`report.html`: one file that needs nothing else, not even a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headwise.report import tables
from headwise.report.markdown import budget, sentence
from headwise.report.section import Section

if TYPE_CHECKING:
    from jinja2 import Environment

ICONS = {"error": "✕", "warning": "!", "note": "i"}
FIRST = {"conclusion": "Conclusion", "flags": "Flags", "verdict": "Verdict", "curves": "Loss"}
LAST = {
    "comparison": "Comparison", "atlas": "Head atlas", "maps": "Attention maps", "costs": "Costs",
    "parts": "Parameters", "heads": "Numbers", "runs": "Runs", "environment": "Environment",
    "appendix": "Configurations",
}  # fmt: skip


def render(data: dict[str, Any], maps: dict[str, Any], sections: Sequence[Section] = ()) -> str:
    """The page, with plotly.js and all data inside.

    Args:
        data: what `collect` gathered; embedded whole as `#report-data`.
        maps: packed attention maps, as `maps.pack` makes them.
        sections: those that `data` was gathered with.
    """
    from plotly.offline import get_plotlyjs

    heads = [
        (
            v["name"],
            tables.per_head_tables(v),
            tables.per_layer_head(v),
        )
        for v in data["variants"] if v["per_layer_head"]
    ]  # fmt: skip
    content: dict[str, Any] = {
        "results": tables.results(data), "compared": tables.comparisons(data), "costs": tables.costs(data),
        "concluded": tables.conclusions(data), "alone": tables.unadjusted(data),
        "parts": tables.parts(data), "runs": tables.runs(data), "splits": tables.other_splits(data),
        "kinds": tables.kinds(data), "configurations": tables.configurations(data),
        "heads": heads, "maps": maps, "facts": _facts(data), "icons": ICONS,
        "colours": {v["name"]: i % 8 for i, v in enumerate(data["variants"])},
        "labels": tables.labels(data),
    }  # fmt: skip
    empty = {
        "curves": not data["curves"], "comparison": not data["comparisons"],
        "atlas": not data["atlas"]["variants"], "maps": not maps, "costs": not content["costs"].rows,
        "parts": not content["parts"].rows, "heads": not heads,
        "appendix": not data["appendix"],
    }  # fmt: skip
    added = [section for section in sections if data[section.name]]
    named = FIRST | {section.name: section.link for section in added} | LAST
    links = [(key, name) for key, name in named.items() if not empty.get(key)]
    content["added"] = [(section, section.tables(data[section.name])) for section in added]
    content["scripts"] = [section.script.read_text(encoding="utf-8") for section in added if section.script]
    template = templates().get_template("report.html.j2")
    return template.render(data=data, links=links, sentence=sentence, plotly=get_plotlyjs(), **content)


def templates() -> Environment:
    """The templates of all pages; what is put into one is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("headwise.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["json"] = embedded
    return environment


def embedded(value: Any) -> Any:
    """JSON that cannot end the script element it stands in."""
    from markupsafe import Markup

    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    found = [("Device", data["device"]), ("Seeds", ", ".join(map(str, data["seeds"])))]
    if size := budget(data):
        found.append(size)
    if len(data["variants"]) > 1:
        found.append(("Baseline", tables.labels(data).get(data["baseline"], data["baseline"])))
    if data["chance_loss"] is not None:
        found.append(("Loss at chance", f"{data['chance_loss']:.4f} nats"))
    found.append(("Written", data["written"]))
    return [(name, str(value)) for name, value in found if value]
