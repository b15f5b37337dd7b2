"""`headwise runs`: list, filter and sort the runs below a folder."""

from __future__ import annotations

import argparse
import json
import math
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError, did_you_mean
from headwise.runs.read import Run, Unreadable, find_runs

COLUMNS = {
    "run": "run", "kind": "kind", "seed": "seed", "state": "state", "step": "step",
    "val_loss": "val loss", "train_loss": "train loss", "val_bits_per_byte": "bits/byte",
    "val_accuracy": "accuracy", "tokens_per_sec": "tokens/s", "params_total": "params",
    "wall_s": "wall s", "reason": "reason",
}  # fmt: skip
FURTHER = ("variant", "path", "max_steps", "engine", "device", "data_checksum")
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
    "<=": operator.le, ">=": operator.ge,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Print the runs as a table, or as JSON."""
    args = _parser().parse_args(argv)
    root = Path(args.root)
    if not root.is_dir():
        raise HeadwiseError(f"no folder {args.root!r} to look for runs in; give the folder that holds them")
    runs = find_runs(root)
    if not runs and not args.json:
        print(f"no runs below {args.root}: a run is a folder with a status.json")
        return 0
    known = _known_columns(runs)
    chosen = [run for run in runs if all(_matches(run, f, known, root) for f in args.filter)]
    if args.sort:
        chosen = _sorted(chosen, args.sort, known, root)
    if args.limit is not None:
        chosen = chosen[: args.limit]
    if args.json:
        print(json.dumps([_record(run, root) for run in chosen], indent=2))
    elif not chosen:
        print(f"none of the {len(runs)} runs below {args.root} matches {' '.join(args.filter)}")
    else:
        _print_table(chosen, root, f"{len(chosen)} of {len(runs)} runs below {args.root}")
    return 0


def value(run: Run, column: str, root: Path) -> Any:
    """One cell; `run` is the folder below `root`."""
    if column == "run":
        return run.path.relative_to(root).as_posix() if run.path != root else root.resolve().name
    return run.get(column)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headwise runs", description=__doc__)
    parser.add_argument("root", nargs="?", default="runs", help="folder to search (default: runs)")
    parser.add_argument("--sort", metavar="COLUMN", help="ascending; -COLUMN descending, as --sort=-step")
    parser.add_argument(
        "--filter", action="append", default=[], metavar="COLUMN=VALUE",
        help="keep runs where it holds, as kind=flash, state!=finished, 'val_loss<2'; repeat to combine",
    )  # fmt: skip
    parser.add_argument("--limit", type=_count, metavar="N", help="show the first N")
    parser.add_argument("--json", action="store_true", help="print every field of every run as JSON")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count; give 0 or more")
    return int(text)


def _known_columns(runs: list[Run]) -> list[str]:
    names = dict.fromkeys([*COLUMNS, *FURTHER])
    for run in runs:
        try:
            names.update(dict.fromkeys(k for k, v in run.summary.items() if not isinstance(v, dict | list)))
        except Unreadable:
            continue
    return list(names)


def _check(column: str, known: list[str]) -> str:
    if column not in known:
        hint = did_you_mean(column, known)
        raise HeadwiseError(f"runs have no column {column!r}{hint}; columns: {', '.join(known)}")
    return column


def _matches(run: Run, text: str, known: list[str], root: Path) -> bool:
    found = re.fullmatch(r"([\w.]+)\s*(!=|<=|>=|=|<|>)\s*(.*)", text)
    if not found:
        raise HeadwiseError(f"--filter {text!r} is not COLUMN=VALUE, as kind=flash or 'val_loss<2'")
    column, sign, wanted = found.groups()
    actual = value(run, _check(column, known), root)
    if isinstance(actual, int | float) and not isinstance(actual, bool):
        try:
            return COMPARE[sign](float(actual), float(wanted))
        except ValueError as error:
            raise HeadwiseError(f"--filter {text!r}: {column} is a number, {wanted!r} is not") from error
    if sign not in ("=", "!="):
        return False
    return COMPARE[sign]("" if actual is None else str(actual), wanted)


def _sorted(runs: list[Run], column: str, known: list[str], root: Path) -> list[Run]:
    """By one column; runs without a value come last whichever the direction."""
    name = _check(column.removeprefix("-"), known)

    def missing(run: Run) -> bool:
        cell = value(run, name, root)
        return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))

    def key(run: Run) -> tuple[bool, Any]:
        cell = value(run, name, root)
        return (True, str(cell)) if not isinstance(cell, int | float) else (False, cell)

    present = sorted((r for r in runs if not missing(r)), key=key, reverse=column.startswith("-"))
    return present + [run for run in runs if missing(run)]


def _record(run: Run, root: Path) -> dict[str, Any]:
    try:
        summary = run.summary
    except Unreadable:
        summary = {}
    cells = {name: value(run, name, root) for name in (*COLUMNS, *FURTHER)}
    return summary | cells


def _print_table(runs: list[Run], root: Path, title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"finished": "green", "running": "cyan", "planned": "dim", "skipped": "dim",
               "interrupted": "yellow", "timed_out": "yellow", "out_of_memory": "yellow"}  # fmt: skip
    rows = [{name: value(run, name, root) for name in COLUMNS} for run in runs]
    shown = [n for n in COLUMNS if any(row[n] not in (None, "") for row in rows)]
    if all("seed_" in row["run"] for row in rows) and "seed" in shown:
        shown.remove("seed")
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in shown:
        numeric = any(isinstance(row[name], int | float) for row in rows)
        table.add_column(
            COLUMNS[name], justify="right" if numeric else "left",
            no_wrap=name != "reason", overflow="fold",
        )  # fmt: skip
    for row in rows:
        cells = [Text(_cell(name, row[name])) for name in shown]
        if "state" in shown:
            cells[shown.index("state")].stylize(colours.get(row["state"], "red"))
        table.add_row(*cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # a pipe has no width to fit
    console.print(table)


def _cell(name: str, cell: Any) -> str:
    if cell is None:
        return ""
    styles = {"tokens_per_sec": ",.0f", "wall_s": ".4g", "params_total": ",.0f"}
    if isinstance(cell, float) or name in styles:
        return format(cell, styles.get(name, ".4f"))
    return str(cell)
