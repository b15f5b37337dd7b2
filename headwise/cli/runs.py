"""`headwise runs`: list, filter and sort the runs below a folder; push, pull and delete runs."""

from __future__ import annotations

import argparse
import json
import math
import operator
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError, did_you_mean
from headwise.runs.index import listed, place_below
from headwise.runs.read import Run, Unreadable

COLUMNS = {
    "run": "run", "kind": "kind", "seed": "seed", "state": "state", "step": "step",
    "val_loss": "val loss", "train_loss": "train loss", "val_bits_per_byte": "bits/byte",
    "val_accuracy": "accuracy", "tokens_per_sec": "tokens/s", "params_total": "params",
    "wall_s": "wall s", "reason": "reason",
}  # fmt: skip
FURTHER = ("variant", "path", "max_steps", "engine", "device", "data_checksum")
LEAVE = (
    "wall_s", "val_accuracy", "params_total", "val_bits_per_byte", "tokens_per_sec", "train_loss", "seed",
    "step", "kind",
)  # fmt: skip
"""Columns that are left out on a narrow terminal, in this order."""

WRAP = {"run": 40, "reason": 16}
"""The smallest widths, in cells of a terminal, to which columns of text are wrapped."""

ACTIONS = ("push", "pull", "delete")
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
    "<=": operator.le, ">=": operator.ge,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Print the runs as a table, or as JSON."""
    if argv and argv[0] in ACTIONS:
        from headwise.cli import runs_copies

        code: int = getattr(runs_copies, argv[0])(argv[1:])
        return code
    args = _parser().parse_args(argv)
    root = Path(args.root)
    if not root.is_dir():
        raise HeadwiseError(f"folder {args.root!r} does not exist; give the folder that holds the runs")
    runs = listed(root, told=_told())
    if not runs and not args.json:
        print(f"no runs below {args.root}: a run is a folder with a status.json")
        return 0
    known = _known_columns(runs) if args.filter or args.sort else []
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
        title = f"{len(chosen):,} of {len(runs):,} runs below {args.root}"
        _print_table(chosen, root, title, (args.sort or "").removeprefix("-"))
    return 0


def value(run: Run, column: str, root: Path) -> Any:
    """One cell; `run` is the folder below `root`."""
    if column == "run":
        return place_below(run.path, root) if run.path != root else root.resolve().name
    return run.get(column)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwise runs",
        description="List, filter and sort the runs below a folder.",
        epilog="`headwise runs push` copies runs to a store, `headwise runs pull` fetches a copy, and "
        "`headwise runs delete` deletes runs; each has its own --help. To list a folder that is called push, "
        "write ./push.",
    )
    parser.add_argument("root", nargs="?", default="runs", help="folder to search (default: runs)")
    parser.add_argument(
        "--sort", metavar="COLUMN", help="sort in ascending order; in descending order with --sort=-COLUMN"
    )
    parser.add_argument(
        "--filter", action="append", default=[], metavar="COLUMN=VALUE",
        help="keep matching runs, such as kind=flash, state!=finished or 'val_loss<2'; repeat to combine",
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
        raise HeadwiseError(f"--filter {text!r} is not COLUMN=VALUE, such as kind=flash or 'val_loss<2'")
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
    """Runs sorted by one column; runs without a value come last in both directions."""
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


def _told() -> Callable[[int, int], None]:
    """A callback that shows the progress of reading, twice a second, if standard error is a terminal."""
    if not sys.stderr.isatty():
        return lambda done, of: None
    begun = shown = time.monotonic()

    def told(done: int, of: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown > 0.5 or (done == of and shown > begun):
            shown = now
            left = (now - begun) / done * (of - done)
            end = "\r\x1b[K" if done == of else ""
            line = f"\rread {done:,} of {of:,} runs, {done / (now - begun):,.0f} a second, {left:.0f} s left"
            print(f"{line}\x1b[K{end}", end="", file=sys.stderr, flush=True)

    return told


def _print_table(runs: list[Run], root: Path, title: str, sorted_by: str) -> None:
    from headwise.cli.listing import Column, plain, table

    colours = {"finished": "green", "running": "cyan", "planned": "dim", "skipped": "dim",
               "interrupted": "yellow", "timed_out": "yellow", "out_of_memory": "yellow",
               "failed": "red", "diverged": "red"}  # fmt: skip
    columns = []
    in_folders = False
    for name in COLUMNS:
        cells = [value(run, name, root) for run in runs]
        in_folders = in_folders or (name == "run" and all("seed_" in cell for cell in cells))
        if (name == "seed" and in_folders) or all(cell in (None, "") for cell in cells):
            continue
        number = any(isinstance(cell, int | float) for cell in cells)
        columns.append(
            Column(
                COLUMNS[name],
                [plain(_cell(name, cell)) for cell in cells],
                number=number,
                wraps=WRAP.get(name),
                leaves=LEAVE.index(name) if name in LEAVE and name != sorted_by else None,
                colours=colours if name == "state" else None,
            )
        )
    width, colour = None, False
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        width, colour = console.width, console.color_system is not None and not console.no_color
    lines, left_out = table(columns, width, colour=colour)
    if left_out:
        lines.append(f"not shown in {width} columns: {', '.join(left_out)}; --json prints all")
    print(plain(title), *lines, sep="\n")


def _cell(name: str, cell: Any) -> str:
    if cell is None:
        return ""
    styles = {"tokens_per_sec": ",.0f", "wall_s": ".4g", "params_total": ",.0f"}
    if isinstance(cell, float) or name in styles:
        return format(cell, styles.get(name, ".4f"))
    return str(cell)
