"""What all benchmarks share: options, limits, timing on the device, tables, and JSON with the environment.

A benchmark is some tables of cases. Its JSON is written whole after every case and names the cases that are
still missing, so that a benchmark that is stopped, at whatever moment, leaves what it measured.

Needs torch and numpy alone.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from headwise.errors import HeadwiseError
from headwise.files import must_be_folder, write_json
from headwise.runs.environment import environment

Row = dict[str, Any]
Case = Callable[[], Row | list[Row]]

WAITING = "not measured yet"
"""Why a case is missing from the JSON of a benchmark that runs, or that was killed."""


def _unchanged(rows: list[Row]) -> list[Row]:
    return rows


@dataclass(frozen=True)
class Table:
    """Rows of a benchmark that are printed as one table.

    Attributes:
        cases: what measures a row, or several, by the name under which the case is reported missing.
        finish: returns the rows to show, given those measured so far: adds ratios, or a summary.
        checks: its rows have `passed`. No time is shown or written unless all of them passed.
    """

    cases: Mapping[str, Case]
    finish: Callable[[list[Row]], list[Row]] = _unchanged
    checks: bool = False


def parser(
    name: str,
    about: str | None,
    *,
    device: str = "auto",
    lengths: str | None = None,
    widths: str | None = None,
    compiled: bool = False,
    quick: bool = False,
    **how: Any,
) -> argparse.ArgumentParser:
    """The options of `headwise bench NAME`: `--device`, `--out`, `--budget-s`, and the axes that it has.

    Args:
        lengths, widths: what `--lengths` and `--widths` choose, for their help. Absent ones are None in the
            arguments. Without a text there is no such option.
        compiled: whether there is `--compile`; read it with `with_compiler`.
        quick: whether there is `--quick`.
        how: more of `ArgumentParser`.
    """
    made = argparse.ArgumentParser(prog=f"headwise bench {name}", description=about, **how)
    add = made.add_argument
    add("--device", default=device, help="default: %(default)s")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON (%(default)s)")
    add("--budget-s", type=_seconds, metavar="SECONDS",
        help="stop after so long; the JSON then has what was measured and names what is missing")  # fmt: skip
    if lengths:
        add("--lengths", "--tokens", type=_count, nargs="+", metavar="T", help=lengths)
    if widths:
        add("--widths", type=_count, nargs="+", metavar="D", help=widths)
    if compiled:
        add("--compile", action=argparse.BooleanOptionalAction,
            help="measure under torch.compile too, or not (default: on a GPU)")  # fmt: skip
    if quick:
        add("--quick", action="store_true", help="small shapes, to see that it works")
    made.set_defaults(began=time.monotonic())
    return made


def with_compiler(arguments: argparse.Namespace, device: torch.device) -> tuple[bool, ...]:
    """Whether to compile, for each time that a case is measured: not, and then compiled where asked."""
    asked = arguments.compile if arguments.compile is not None else device.type == "cuda"
    return (False, True) if asked else (False,)


def run(
    name: str, arguments: argparse.Namespace, tables: Sequence[Table], *, device: torch.device | str
) -> int:
    """Measure every case, write `out/NAME-DEVICE.json` after each, print the tables; returns the exit code.

    A case that fails is missing, with its error as the reason, and the others are measured. When the time of
    `--budget-s` is over, the case that runs is cut off and the rest is missing.

    Args:
        arguments: what `parser` parsed.

    Raises:
        HeadwiseError: nothing can be written to `--out`, or a case refuses what the user asked for.
    """
    must_be_folder(arguments.out)
    result = _Result(name, arguments.out, torch.device(device), tables)
    budget, began = arguments.budget_s, time.monotonic()
    for number, table in enumerate(tables):
        for case, function in table.cases.items():
            left = None if budget is None else arguments.began + budget - time.monotonic()
            try:
                with _at_most(left):
                    found = function()
                result.measured(number, case, found if isinstance(found, list) else [found])
            except _OutOfTime:
                result.out_of_time(budget)
                result.write()
                return result.show()
            except HeadwiseError:
                raise
            except Exception as error:
                traceback.print_exc()
                result.failed(number, case, error)
            if not result.checked():
                print_table(result.rows[number])
                print("not what the definition gives: no times are shown or written")
                return 1
            if not result.checks_wait():
                result.write()
            result.progress(case, time.monotonic() - began)
    return result.show()


class _Result:
    """What a benchmark has measured, and what is missing."""

    def __init__(self, name: str, out: Path, device: torch.device, tables: Sequence[Table]) -> None:
        self.path = out / f"{name}-{device.type}.json"
        self.tables = tables
        self.rows: list[list[Row]] = [[] for _ in tables]
        self.missing = {
            (number, case): WAITING for number, table in enumerate(tables) for case in table.cases
        }
        self.n_cases, self.n_failed = len(self.missing), 0
        self.about = {"benchmark": name, "environment": environment(str(device))}

    def measured(self, number: int, case: str, rows: list[Row]) -> None:
        """A case of a table is there."""
        self.rows[number] += rows
        del self.missing[number, case]

    def failed(self, number: int, case: str, error: Exception) -> None:
        """A case is missing because of an error."""
        self.n_failed += 1
        self.missing[number, case] = f"{type(error).__name__}: {error}".partition("\n")[0][:300]

    def out_of_time(self, budget: float) -> None:
        """All that was not tried is missing for want of time."""
        late = f"the {budget:g} s of --budget-s were over"
        self.missing = {key: late if why == WAITING else why for key, why in self.missing.items()}

    def checked(self) -> bool:
        """Whether no check failed so far: none has a wrong result, or none at all."""
        checks = [number for number, table in enumerate(self.tables) if table.checks]
        wrong = any(not row["passed"] for number in checks for row in self.rows[number])
        return not wrong and not any(n in checks and why != WAITING for (n, _), why in self.missing.items())

    def checks_wait(self) -> bool:
        """Whether there are checks to come."""
        return any(self.tables[number].checks for number, _ in self.missing)

    def finished(self) -> list[list[Row]]:
        """Every table's rows as they are shown."""
        return [
            table.finish(rows) if rows else [] for table, rows in zip(self.tables, self.rows, strict=True)
        ]

    def write(self) -> None:
        """Write the JSON, checks first."""
        parts = sorted(zip(self.tables, self.finished(), strict=True), key=lambda part: not part[0].checks)
        missing = [{"case": case, "reason": reason} for (_, case), reason in self.missing.items()]
        result = self.about | {
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": [row for _, rows in parts for row in rows],
            "missing": missing,
        }
        write_json(self.path, json.loads(json.dumps(result)))

    def progress(self, case: str, seconds: float) -> None:
        """A line about how far it is."""
        waiting = sum(reason == WAITING for reason in self.missing.values())
        done = self.n_cases - waiting
        rest = seconds / done * waiting
        print(f"{done}/{self.n_cases} {case}: {seconds:.0f} s, about {rest:.0f} s left", file=sys.stderr)

    def show(self) -> int:
        """Print the tables and what is missing; returns the exit code, 1 where a case failed."""
        for rows in self.finished():
            for group in _same_columns(rows):
                print_table(group)
        for (_, case), reason in self.missing.items():
            print(f"missing: {case} ({reason})")
        print(f"written: {self.path}")
        return 1 if self.n_failed else 0


def beside(
    rows: list[Row], column: str, ratio: str, *, base: Mapping[str, Any], by: Sequence[str] = ()
) -> list[Row]:
    """Rows with `ratio`: `column` as a multiple of that of the row that has the values of `base`.

    Args:
        by: columns in which both rows are equal.

    Returns:
        The rows, with None where there is no such row, or no number.
    """
    known: dict[tuple[Any, ...], Any] = {}
    for row in rows:
        if all(row.get(key) == value for key, value in base.items()):
            known.setdefault(tuple(row[name] for name in by), row[column])
    found = []
    for row in rows:
        of = known.get(tuple(row[name] for name in by))
        found.append(row | {ratio: row[column] / of if of and row[column] is not None else None})
    return found


class _OutOfTime(BaseException):
    """The time of `--budget-s` is over. No `except Exception` of a library stops it."""


@contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    """Raise _OutOfTime in the block when it has run for so long."""
    if seconds is None:
        yield
        return
    if seconds <= 0:
        raise _OutOfTime

    def over(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # again: what is raised in a __del__ is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def measure(
    function: Callable[[], Any], device: torch.device, *, seconds: float = 0.5, least: int = 5
) -> float:
    """Median milliseconds of a call, after a warm-up, over about `seconds` of calls."""
    for _ in range(2):
        function()
    once = _timed(function, device)
    times = [_timed(function, device) for _ in range(max(least, int(seconds * 1e3 / max(once, 1e-3))))]
    return statistics.median(times)


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`function` as a CUDA graph, so that only the device's time is measured; itself on a CPU.

    What launching from Python costs is hidden in training, where the device lags behind the host.
    """
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def extra_memory_mb(function: Callable[[], Any], device: torch.device) -> float | None:
    """Peak device memory that a call needs beyond what is allocated before it, in MB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize(device)
    del result
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows under the names of the first one's columns."""
    if not rows:
        return
    names = list(rows[0])
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _same_columns(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Neighbouring rows of the same columns."""
    group: list[Row] = []
    for row in rows:
        if group and list(row) != list(group[0]):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
    return str(value)
