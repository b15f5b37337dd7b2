"""Write `docs/performance.md` from the committed JSON of `benchmarks/results`: no number there is typed."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from headwise import reading
from headwise.files import write_text

HEADING = """# Performance

Every number below comes from a JSON file in `benchmarks/results/`, written by the command named with it;
`headwise bench page` writes this page. Compare ratios within a table, never times across machines.
"""


class About(TypedDict):
    """Where a benchmark was measured, as far as the page tells."""

    threads: int
    device: str
    device_name: str
    torch: str


class Missing(TypedDict):
    """A case that was not measured."""

    case: str
    reason: str


class Result(TypedDict):
    """A benchmark's JSON."""

    benchmark: str
    measured: str
    environment: About
    rows: list[dict[str, Any]]
    missing: NotRequired[list[Missing]]


def main(argv: list[str]) -> int:
    """Write the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="headwise bench page", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    arguments = parser.parse_args(argv)
    write_text(arguments.out, page(arguments.results))
    print(f"written: {arguments.out}")
    return 0


def page(results: Path) -> str:
    """The page's Markdown from a folder of results."""
    return "\n".join([HEADING, *(_section(path) for path in sorted(results.glob("*.json")))])


def _section(path: Path) -> str:
    result = reading.read_json(path, Result)
    about = result["environment"]
    cores = "one CPU thread" if about["threads"] == 1 else f"{about['threads']} CPU threads"
    device = about["device_name"] if about["device"] != "cpu" else cores
    lines = [
        f"## {result['benchmark']} on {device}",
        "",
        f"`headwise bench {result['benchmark']} --device {about['device']}`, torch {about['torch']}, "
        f"measured {result['measured'][:10]} ([JSON](../{path.as_posix()})).",
        "",
    ]
    measured = [row for row in result["rows"] if "passed" not in row]
    missing = [f"{one['case']} ({one['reason']})" for one in result.get("missing", [])]
    lost = ["", f"Not measured: {'; '.join(missing)}."] if missing else []
    return "\n".join([*lines, *_tables(measured), *lost, *_checks(result["rows"]), ""])


def _tables(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A table for each run of rows with the same columns."""
    lines: list[str] = []
    for names, group in itertools.groupby(rows, key=tuple):
        lines += [""] if lines else []
        lines += [_line(names), _line("---" for _ in names)]
        lines += [_line(_cell(row[name]) for name in names) for row in group]
    return lines


def _checks(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Comparisons with float64, folded away behind how many passed."""
    checks = [row for row in rows if "passed" in row]
    if not checks:
        return []
    passed = sum(row["passed"] for row in checks)
    summary = f"Checked against float64 first: {passed} of {len(checks)} cases pass"
    return ["", f"<details><summary>{summary}</summary>", "", *_tables(checks), "", "</details>"]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
