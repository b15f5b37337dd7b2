"""The table of groups and the figure of a block, for the document and for the page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from headwise.analysis.statistics import Summary, summarize
from headwise.errors import HeadwiseError
from headwise.files import replacing
from headwise.notebook.document import Compare
from headwise.notebook.memory import Memory, PastBlock
from headwise.notebook.verbs import result_of, state_of_verb, tail
from headwise.report.tables import METRICS, Metric, Table
from headwise.runs.folder import RESULTS, RunFolder, state_of
from headwise.runs.read import Run

SHOWN = ("val_loss", "val_bits_per_byte", "val_accuracy")
PICTURE = "loss.png"
MOST_LINES = 50
"""The most runs of a group in a figure."""


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, which differ only in the seed."""

    name: str
    runs: list[Run]
    seeds: list[int]
    ids: list[str]

    def values(self, measure: str) -> dict[int, float]:
        """Seed -> value of the runs that finished with a finite value."""
        found = {}
        for seed, run in zip(self.seeds, self.runs, strict=True):
            value = value_of(run, measure)
            if value is not None:
                found[seed] = value
        return found

    def summary(self, measure: str) -> Summary:
        """Mean and 95% interval over the seeds."""
        return summarize(self.values(measure).values())


def value_of(run: Run, measure: str) -> float | None:
    """A number from the summary of a finished run, or None."""
    value = run.get(measure) if run.state == "finished" else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def has_result(path: Path) -> bool:
    """Whether the run in this folder has ended with a result."""
    try:
        return state_of(RunFolder(path).read_status()) in RESULTS
    except HeadwiseError:
        return False


def groups_of(past: PastBlock, folder: Path) -> list[Group]:
    """The groups of a block, in its order."""
    found: dict[str, Group] = {}
    for run in past["runs"]:
        group = found.setdefault(run["group"], Group(run["group"], [], [], []))
        group.runs.append(Run(folder / run["path"]))
        group.seeds.append(run["seed"])
        group.ids.append(run["id"])
    return list(found.values())


def table(groups: Sequence[Group], measures: Sequence[str] = ()) -> Table:
    """One row per group: mean ± half-width of the 95% interval of each measure, and the number of seeds."""
    names = [
        name for name in dict.fromkeys([*SHOWN, *measures]) if any(group.values(name) for group in groups)
    ]
    rows = []
    for group in groups:
        ended = sum(run.state == "finished" for run in group.runs)
        cells = [cell(group.summary(name), name) for name in names]
        rows.append([group.name, f"{ended} of {len(group.runs)}", *cells])
    some = any(group.summary(name).n > 1 for group in groups for name in names)
    note = "Mean ± half-width of the 95% interval over seeds" if some else "One seed gives no interval"
    return Table(
        ["group", "finished", *(label(name) for name in names)],
        rows,
        f"{note}; n is the number of seeds." * bool(names),
    )


def cell(summary: Summary, measure: str) -> str:
    """`1.2345 ± 0.0123 (n = 3)`."""
    if summary.mean is None:
        return "no value"
    style = METRICS.get(measure, Metric(measure)).style
    spread = "" if summary.ci95 is None else f" ± {format(summary.ci95, style)}"
    return f"{format(summary.mean, style)}{spread} (n = {summary.n})"


def label(measure: str) -> str:
    """The name of a measure with its unit."""
    known = METRICS.get(measure, Metric(measure))
    return f"{known.label} ({known.unit})" if known.unit else known.label


def troubles(groups: Sequence[Group]) -> list[str]:
    """A line for each of the first ten runs that did not finish, with the reason."""
    found = []
    for group in groups:
        for seed, run in zip(group.seeds, group.runs, strict=True):
            if run.state != "finished":
                found.append(
                    f"{group.name}, seed {seed}: {run.state}{f' ({run.reason})' if run.reason else ''}"
                )
    return found if len(found) <= 10 else [*found[:10], f"and {len(found) - 10} more"]


def measures_of(compares: Sequence[Compare], groups: Sequence[Group]) -> list[str]:
    """The measures in which any of these groups is compared."""
    names = {group.name for group in groups}
    return [compare.measure for compare in compares if {compare.a, compare.b} & names]


def links(past: PastBlock, folder: Path) -> list[tuple[str, str]]:
    """Names and relative paths of the report of a block's study and of the folder of its runs."""
    found = []
    if past["study"] and (folder / past["study"] / "report.html").is_file():
        found.append(("report of the study", f"{past['study']}/report.html"))
    homes = dict.fromkeys(run["path"].rpartition("/")[0] or "." for run in past["runs"])
    if homes:
        found.append(("runs", past["study"] or next(iter(homes))))
    return found


def picture_of(name: str, past: PastBlock, memory: Memory) -> Path | None:
    """The path of a block's figure; None if the block has no runs."""
    return memory.path.parent / "runs" / _stem(memory) / name / PICTURE if past["runs"] else None


def _stem(memory: Memory) -> str:
    return memory.path.name.removesuffix(".headwise.json")


def draw(name: str, past: PastBlock, memory: Memory) -> Path | None:
    """Draw the loss over steps, one line per run, one colour per group; None if no run has two
    evaluations."""
    from headwise.report.drawing import COLOURS, finish_axis, new_figure

    path = picture_of(name, past, memory)
    lines = []
    for number, group in enumerate(groups_of(past, memory.path.parent)):
        for run in group.runs[:MOST_LINES]:
            try:
                steps, values = run.curve("val", "loss")
            except HeadwiseError:
                continue
            if len(steps) > 1:
                lines.append((number, group.name, steps, values))
    if path is None or not lines:
        return None
    figure, axes = new_figure(1, 1, 6.4, 3.0)
    axis, named = axes[0][0], set()
    for number, group_name, steps, values in lines:
        shown = None if number in named else group_name[:60].replace("$", r"\$")
        named.add(number)
        axis.plot(steps, values, color=COLOURS[number % len(COLOURS)], linewidth=1.2, alpha=0.8, label=shown)
    finish_axis(axis, "validation loss, one line per seed", "step")
    if len(named) <= 12:
        axis.legend(fontsize=7, frameon=False)
    with replacing(path) as draft:
        figure.savefig(draft, dpi=110, format="png")
    return path


def text(name: str, past: PastBlock, memory: Memory, compares: Sequence[Compare] = ()) -> str:
    """The result of a block as Markdown."""
    folder = memory.path.parent
    groups = groups_of(past, folder)
    parts = []
    if groups:
        parts.append(markdown(table(groups, measures_of(compares, groups))))
        parts.append("\n".join(f"- {escaped(line)}" for line in troubles(groups)))
    for verb in past["verbs"]:
        parts.append(_verb(folder / verb, verb))
    if picture := draw(name, past, memory):
        parts.append(f"![Loss of {escaped(name)}](<{url(picture.relative_to(folder).as_posix())}>)")
    parts.append(" · ".join(f"[{escaped(what)}](<{url(path)}>)" for what, path in links(past, folder)))
    return "\n\n".join(part for part in parts if part)


def _verb(folder: Path, path: str) -> str:
    ended = result_of(folder)
    how = f"{state_of_verb(folder)}" + (f", {ended['seconds']:.0f} s" if ended else "")
    if ended and ended["code"]:
        how += f", exit code {ended['code']}"
    last = tail(folder).replace("<!--", "< !--")
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", last)), default=0))
    shown = f"\n\n{ticks}text\n{last}\n{ticks}" if last else ""
    return f"{how} ([log](<{url(path)}/log.txt>)){shown}"


def markdown(table: Table) -> str:
    """A table as Markdown, with its cells escaped."""
    lines = [table.headers, ["---"] * len(table.headers), *table.rows]
    rows = "\n".join(f"| {' | '.join(escaped(cell) for cell in line)} |" for line in lines)
    return f"{rows}\n\n{table.note}" if table.note else rows


def escaped(text: str) -> str:
    """Text on one line, escaped so that Markdown and HTML show it literally."""
    text = " ".join(text.split())
    if text == "---":
        return text
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def url(path: str) -> str:
    """A relative path as a link: no part of it is a scheme, a query or a place in a page."""
    return quote(path, safe="/._-~@=+,")
