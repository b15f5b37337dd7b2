"""Scaling in a report: loss, memory and speed against the length, the rank, and the longest sequences.

Runs are on one line if they differ only in the length or the rank, and in keys that depend on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from headwise.analysis.statistics import summarize
from headwise.report.compare import number
from headwise.report.drawing import COLOURS, finish_axis, new_figure
from headwise.report.exports import rank_of
from headwise.report.section import Drawn, Found, Section, Titled
from headwise.report.tables import Table, plus_minus
from headwise.runs.read import Run, Unreadable, longest_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURED = ("val_loss", "peak_vram_mb", "peak_rss_mb", "tokens_per_sec")
FOLLOW = re.compile(
    r"seed|out|device|expected_engine|data\.(seq_len|batch_size|eval_seq_lens)|model\.max_seq_len|"
    r"training\.(max_\w+|total_batch_tokens|timeout_s)"
)
"""Keys that may differ between the runs of one line."""


def collect(among: Found) -> dict[str, Any]:
    """Points of every line; empty where no line has two lengths or ranks and no search was made.

    Returns:
        `points`, each `{line, kind, rank, seq_len, n, results}` of the runs that finished; `by_length` and
        `by_rank`, whether there is a second of either; `longest`, the rows of max_lengths.json.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in among.runs:
        if run.state == "finished" and run.get("seq_len"):
            groups.setdefault((_line(run), rank_of(run), run.get("seq_len")), []).append(run)
    labels = _labels(groups)
    points = [
        {
            "line": labels[line], "kind": runs[0].get("kind"), "rank": rank, "seq_len": length,
            "n": len(runs),
            "results": {key: asdict(found) for key in MEASURED
                        if (found := summarize(v for run in runs if (v := number(run, key)) is not None)).n},
        }
        for (line, rank, length), runs in groups.items()
    ]  # fmt: skip
    points.sort(key=lambda point: (point["line"], point["rank"] or 0, point["seq_len"]))
    lines: dict[tuple[Any, ...], set[int]] = {}
    for point in points:
        lines.setdefault(("length", point["line"], point["rank"]), set()).add(point["seq_len"])
        if point["rank"] is not None:
            lines.setdefault(("rank", point["line"], point["seq_len"]), set()).add(point["rank"])
    by = {which: any(key[0] == which and len(found) > 1 for key, found in lines.items())
          for which in ("length", "rank")}  # fmt: skip
    longest = longest_of(among.runs)
    if not any(by.values()) and not longest:
        return {}
    return {"points": points, "by_length": by["length"], "by_rank": by["rank"], "longest": longest}


def _line(run: Run) -> tuple[Any, ...]:
    """The identity of a line: the kind, and the configuration without length and rank."""
    kind = str(run.get("kind"))
    try:
        values = run.config
    except Unreadable:
        return (kind, run.path)
    rank = f"model.attention.{kind}.rank"
    own = [(key, repr(value)) for key, value in flat(values) if key != rank and not FOLLOW.fullmatch(key)]
    return (kind, *sorted(own))


def flat(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping."""
    if not isinstance(values, dict):
        return [(prefix, values)]
    return [item for key, value in values.items()
            for item in flat(value, f"{prefix}.{key}" if prefix else str(key))]  # fmt: skip


def _labels(groups: dict[tuple[Any, ...], list[Run]]) -> dict[tuple[Any, ...], str]:
    """The kind, followed by the variant's name if two lines have the same kind."""
    first = {line: runs[0] for (line, *_), runs in reversed(groups.items())}
    kinds = [line[0] for line in first]
    return {
        line: line[0] if kinds.count(line[0]) == 1 else f"{line[0]} ({str(run.variant).partition('@')[0]})"
        for line, run in first.items()
    }


def tables(data: dict[str, Any]) -> list[Titled]:
    """Every point, and the longest sequences."""
    names = [key for key in MEASURED if any(key in point["results"] for point in data["points"])]
    rows = [
        [p["line"], "" if p["rank"] is None else str(p["rank"]), str(p["seq_len"]), str(p["n"]),
         *(plus_minus(p["results"].get(key), key) for key in names)]
        for p in data["points"]
    ]  # fmt: skip
    words = {"val_loss": "validation loss (nats)", "peak_vram_mb": "peak device memory (MB)",
             "peak_rss_mb": "peak process memory (MB)", "tokens_per_sec": "tokens per second"}  # fmt: skip
    points = Table(["line", "rank", "length", "n", *(words[key] for key in names)], rows)
    longest = [
        [row["variant"], row["kind"], f"{row['limit_mb']:,.0f}", _length(row), row.get("measured_by", "")]
        for row in data["longest"]
    ]
    headers = ["variant", "kind", "memory (MB)", "longest sequence", "measured by"]
    note = "One sequence per step, two training steps at each length; lengths are multiples of 64."
    return [Titled(points), Titled(Table(headers, longest, note), "Longest trainable sequence")]


def _length(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"not found: {row['problem']}"
    if not row["max_seq_len"]:
        return "none fits"
    return f"{'at least ' if row['capped'] else ''}{row['max_seq_len']:,}"


def figures(data: dict[str, Any], variants: list[str]) -> list[Drawn]:
    """Against the length: loss, memory and speed; against the rank: loss and memory."""
    memory = "peak_vram_mb" if any("peak_vram_mb" in p["results"] for p in data["points"]) else "peak_rss_mb"
    titles = {
        "val_loss": ("Validation loss (nats)", "loss_vs_seq_len.png"),
        memory: (f"Peak memory of the {'device' if memory == 'peak_vram_mb' else 'process'} (MB)",
                 "vram_vs_seq_len.png"),
        "tokens_per_sec": ("Tokens per second", "tokens_vs_seq_len.png"),
    }  # fmt: skip
    drawn = []
    if data["by_length"]:
        for key, (title, file) in titles.items():
            if (figure := _figure(data["points"], [(key, title)], "seq_len", _of_length)) is not None:
                drawn.append(Drawn(figure, f"{title.partition(' (')[0]} against the length", file))
    if data["by_rank"]:
        ranked = [point for point in data["points"] if point["rank"] is not None]
        for kind in dict.fromkeys(point["kind"] for point in ranked):
            mine = [point for point in ranked if point["kind"] == kind]
            panels = [(key, titles[key][0]) for key in ("val_loss", memory)]
            if (figure := _figure(mine, panels, "rank", _of_rank)) is not None:
                title = f"Loss and memory against the rank of {kind}"
                drawn.append(Drawn(figure, title, f"{kind}_rank_tradeoff.png"))
    return drawn


def _of_length(point: dict[str, Any]) -> str:
    return point["line"] if point["rank"] is None else f"{point['line']}, rank {point['rank']}"


def _of_rank(point: dict[str, Any]) -> str:
    return f"{point['line']}, length {point['seq_len']}"


def _figure(
    points: list[dict[str, Any]], panels: list[tuple[str, str]], x: str, name: Callable[[dict[str, Any]], str]
) -> Figure | None:
    panels = [panel for panel in panels if any(panel[0] in point["results"] for point in points)]
    if not panels:
        return None
    figure, axes = new_figure(1, len(panels), 4.6 * len(panels), 3.4)
    names = list(dict.fromkeys(name(point) for point in points))
    for axis, (key, title) in zip(axes[0], panels, strict=True):
        for number_, line in enumerate(names):
            mine = [p for p in points if name(p) == line and key in p["results"]]
            axis.errorbar(
                [p[x] for p in mine], [p["results"][key]["mean"] for p in mine],
                yerr=[p["results"][key]["ci95"] or 0 for p in mine], label=line, marker="o", capsize=3,
                linewidth=1.4, color=COLOURS[number_ % len(COLOURS)],
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        ticks = sorted({point[x] for point in points})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        finish_axis(axis, title, "length (tokens)" if x == "seq_len" else x)
    axes[0][0].legend(frameon=False, fontsize=7)
    return figure


SCALING = Section(
    name="scaling", title="Scaling: length, rank and memory", link="Scaling", collect=collect, tables=tables,
    figures=figures,
)  # fmt: skip
