"""Pruning in a study's report: the cost of removing heads against random, and whether a measure tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.questions.prune import page
from headwise.questions.prune.files import RECORD, RESULTS, read, results_csv
from headwise.report.section import Drawn, Found, Section, Titled
from headwise.report.tables import Table
from headwise.runs.read import Run


def records(runs: list[Run]) -> list[dict[str, Any]]:
    """Every pruning of these runs, or by which one of them was made; damaged records are left out."""
    found = []
    for run in runs:
        for path in (run.path / RECORD, *sorted((run.path / "prune").glob(f"*/{RECORD}"))):
            try:
                record = read(path)
            except HeadwiseError:
                continue
            if record is not None:
                found.append(record | {"variant": str(run.variant), "run_seed": run.seed})
    return found


def collect(among: Found) -> list[dict[str, Any]]:
    """The records of all prunings."""
    return records(among.runs)


def table(found: list[dict[str, Any]]) -> Table:
    """A row for each pruning."""
    rows = []
    for record in found:
        law = next((law for law in record["law"] if law["measure"] == record["by"]), None)
        against, speed = record["against_random"], record["speed"]
        rho = "" if law is None or law["rho"] is None else (
            f"{law['rho']:+.2f} ({law['low']:+.2f} to {law['high']:+.2f}), p {law['p']:.3g}"
        )  # fmt: skip
        rows.append([
            record["variant"], "" if record["run_seed"] is None else str(record["run_seed"]),
            f"{page._name(record)}{', zeroed' if record['zeroed'] else ''}",
            f"{len(record['removed'])} of {record['n_heads']}", f"{record['loss']['before']:.4f}",
            page._signed(record["loss"]["delta"]), page._signed(against["delta"]) if against else "",
            against["verdict"] if against else "", rho, f"{speed['speedup']:.2f}",
        ])  # fmt: skip
    headers = ["variant", "seed", "removal", "heads", "loss before", "difference", "random", "against random",
               "ρ with importance", "speed-up"]  # fmt: skip
    note = "Nats per token, ± half of the 95% interval; ρ is Spearman's over heads, of the measure ranked by."
    return Table(headers, rows, note)


PRUNING = Section(
    name="pruning",
    title="Pruning of heads",
    link="Pruning",
    collect=collect,
    tables=lambda found: [Titled(table(found))],
    figures=lambda found, variants: [Drawn(page.figure(found), "Impact of pruning", "pruning.png")],
    note="Grey: random removals of as many heads.",
    exports=lambda runs: {RESULTS: results_csv(found)} if (found := records(runs)) else {},
    script=Path(__file__).with_name("section.js"),
)
