"""Write `docs/performance.md` from the committed JSON of `benchmarks/results`: no number there is typed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from headwise.storage.atomic import write_text

HEADING = """# Performance

Every number below comes from a JSON file in `benchmarks/results/`, written by the command named with it;
`headwise bench page` writes this page. Compare ratios within a table, never times across machines.
"""


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
    result = json.loads(path.read_text(encoding="utf-8"))
    about = result["environment"]
    device = about["device_name"] if about["device"] != "cpu" else f"{about['threads']} CPU threads"
    lines = [
        f"## {result['benchmark']} on {device}",
        "",
        f"`headwise bench {result['benchmark']} --device {about['device']}`, torch {about['torch']}, "
        f"measured {result['measured'][:10]} ([JSON](../{path.as_posix()})).",
        "",
    ]
    return "\n".join([*lines, *_table(result["rows"]), ""])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    return lines + ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
