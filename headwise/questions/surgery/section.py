"""Head surgery in a report: loss before and after, the curve from there, and whether the new head moved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.errors import HeadwiseError
from headwise.report.curves import MAX_POINTS, thin
from headwise.report.drawing import COLOURS, INK, finish_axis, new_figure
from headwise.report.section import Drawn, Found, Section, Titled
from headwise.report.tables import Table, plain
from headwise.runs import operation as new_head
from headwise.runs.read import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"q": "queries", "k": "keys", "v": "values", "o": "output"}


def collect(among: Found) -> list[dict[str, Any]]:
    """What each run that began with an operation has to say; empty where none did."""
    found = []
    for run in among.runs:
        try:
            record = new_head.read(run.path)
            if record is None or run.problem:
                continue
            step, moved = new_head.movement(run.path)
            rows, text = new_head.as_rows(moved), new_head.statement(step, moved)
        except HeadwiseError as error:
            rows, text, record = [], str(error), {}
        found.append(_entry(run, record, rows, text))
    return found


def _entry(run: Run, record: dict[str, Any], movement: list[dict[str, Any]], text: str) -> dict[str, Any]:
    steps, losses = run.curve("val", "loss")
    kept = thin(steps, MAX_POINTS)
    values = dict(zip(steps.tolist(), losses.tolist(), strict=True))
    keys = ("source", "operated_in", "place", "init", "n_heads", "preserves", "why", "learns", "val_loss")
    return {
        "variant": str(run.variant), "seed": run.seed, **{key: record.get(key) for key in keys},
        "kinds": list(dict.fromkeys(filter(None, (record.get("source_kind"), run.get("kind"))))),
        "movement": movement, "statement": text,
        "curve": {"steps": kept.tolist(), "values": [values[step] for step in kept.tolist()]},
    }  # fmt: skip


def before_and_after(entries: list[dict[str, Any]]) -> Table:
    """One row a run: what was done, and the validation loss of the source, operated, and now."""
    rows = []
    for entry in entries:
        losses, curve = entry["val_loss"] or {}, entry["curve"]["values"]
        heads = " → ".join(map(str, entry["n_heads"] or []))
        rows.append([
            entry["variant"], "" if entry["seed"] is None else str(entry["seed"]), entry["source"] or "",
            " → ".join(entry["kinds"]), f"{heads}, {entry['place']}", entry["init"] or "",
            "preserved" if entry["preserves"] else "not preserved", plain(losses.get("source"), ".4f"),
            plain(losses.get("operated"), ".4f"), plain(curve[0] if curve else None, ".4f"),
            plain(curve[-1] if curve else None, ".4f"), entry["statement"],
        ])  # fmt: skip
    headers = ["variant", "seed", "source", "kind", "heads", "init", "function", "loss of the source",
               "operated", "first evaluation", "last", "the new head"]  # fmt: skip
    return Table(headers, rows, "Validation loss in nats; the source and the operated model before any step.")


def moved(entries: list[dict[str, Any]]) -> Table:
    """One row a run, layer and part: the share of the new head's weights that moved, and their norm."""
    rows = [
        [entry["variant"], "" if entry["seed"] is None else str(entry["seed"]), str(row["layer"]),
         NAMES[row["part"]], f"{row['moved']:.2%}", f"{row['nonzero']:.2%}", f"{row['norm_start']:.4f}",
         f"{row['norm_end']:.4f}"]
        for entry in entries for row in entry["movement"]
    ]  # fmt: skip
    note = (
        "Weights of the new head at the last checkpoint against those it began with. Weight decay alone "
        "moves what is not 0; what began at 0 moves by its gradient only."
    )
    headers = ["variant", "seed", "layer", "part", "moved", "not 0", "norm at the start", "norm now"]
    return Table(headers, rows, note)


def tables(entries: list[dict[str, Any]]) -> list[Titled]:
    """What was done, and what became of the new head."""
    return [
        Titled(before_and_after(entries)),
        Titled(moved(entries), "Weights of the new head, layer by layer", folded=True),
    ]


def figures(entries: list[dict[str, Any]], variants: list[str]) -> list[Drawn]:
    """The loss and the new head."""
    return [Drawn(figure(entries), "Head surgery", "surgery.png")]


def figure(entries: list[dict[str, Any]]) -> Figure:
    """The curve from the operation on, and the norms of the first run's new head by layer."""
    drawn, axes = new_figure(1, 2, 9.6, 3.4)
    curve, norms = axes[0]
    for entry, colour in zip(entries, COLOURS * len(entries), strict=False):
        name = f"{entry['variant']}, {entry['init']} at the {entry['place']}"
        losses = entry["val_loss"] or {}
        if entry["curve"]["steps"]:
            curve.plot(entry["curve"]["steps"], entry["curve"]["values"], color=colour, label=name)
        if "operated" in losses:
            curve.plot([0], [losses["operated"]], "o", color=colour, markersize=5)
            curve.axhline(losses["source"], color=INK, linewidth=0.8, linestyle="--")
    if curve.get_legend_handles_labels()[0]:
        curve.legend(frameon=False, fontsize=8)
    finish_axis(curve, "validation loss (nats); dashed: the source, dot: operated", "step")
    for part, colour in zip(NAMES, COLOURS, strict=False):
        rows = [row for row in entries[0]["movement"] if row["part"] == part]
        if rows:
            layers = [row["layer"] for row in rows]
            norms.plot(layers, [r["norm_start"] for r in rows], ":", color=colour, marker="o", markersize=3)
            norms.plot(layers, [r["norm_end"] for r in rows], color=colour, marker="o", label=NAMES[part])
    if norms.get_legend_handles_labels()[0]:
        norms.legend(frameon=False, fontsize=8)
    norms.xaxis.get_major_locator().set_params(integer=True)
    finish_axis(norms, f"norm of the new head in {entries[0]['variant']}; dotted: at its start", "layer")
    return drawn


SURGERY = Section(
    name="surgery",
    title="Head surgery",
    link="Head surgery",
    collect=collect,
    tables=tables,
    figures=figures,
    script=Path(__file__).with_name("section.js"),
)
