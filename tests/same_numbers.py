"""Do two checkouts give the same numbers? `python -m tests.same_numbers OLD_CHECKOUT NEW_CHECKOUT`

Runs the same small commands (small_commands.py) through the command line of each checkout, with this Python,
on one thread of a CPU, and compares every number that they write, bit for bit. It knows verbs, options and
files, and no module of headwise, so that the two checkouts may be laid out differently.

A file or a number that is only in NEW is fine. One that is only in OLD, or that differs, is a difference, and
the exit code is 1; differences that are meant are listed in `INTENDED`, names that changed in `RENAMED`.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.small_commands import COMMANDS, run_all, shared_files

INTENDED: dict[str, str] = {
    "*flops*": "FLOPs of selection are counted",
    "*report.json:comparisons.*": "intervals are simultaneous over variants, and p_adjusted is theirs",
    "*report.json:conclusions.*.further_seeds*": "it is a range",
    "*report.json:verdict_note": "it is conclusion_note",
    "*report.json:verdicts.*": "verdicts are by the criteria of the study, against its own baseline",
    "shards/manifest.json:settings.input.*": "the input is known by its content, not by its size",
}
"""`FILE:NAME`, as the table prints it and with `*` for any part -> why this number may differ or be gone."""

RENAMED: dict[str, str] = {
    "memory": "kept_context",
}
"""The name of a column, key, tensor or file in OLD -> its name in NEW, used where NEW lacks the old one."""

UNSTEADY = re.compile(
    r"(^|[._])(seconds|elapsed|started|finished|written|time|date|heartbeat|pid|data_wait|speed|bytes|mb"
    r"|per_sec|per_second)($|[._])|_(s|ms)($|[.])"
)
"""Names of times, speeds and bytes: they differ between two runs of one checkout."""


def numbers(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every number, truth value and null of a JSON value, by its dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            metric = inner.get("metric") if isinstance(inner, dict) else None
            yield from numbers(inner, f"{name}.{index}.{metric}" if metric else f"{name}.{index}")
    elif not isinstance(value, str):
        yield name, value


def as_number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def of_csv(path: Path) -> dict[str, object]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [as_number(row[name] or "") for row in rows] for name in rows[0]} if rows else {}


def of_parquet(path: Path) -> dict[str, object]:
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    return {name: table[name].to_pylist() for name in table.column_names}


def of_safetensors(path: Path) -> dict[str, object]:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path)
    return {
        name: (t.view(torch.int16) if t.dtype is torch.bfloat16 else t).numpy() for name, t in tensors.items()
    }


def of_npz(path: Path) -> dict[str, object]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def of_text(path: Path) -> dict[str, object]:
    """The text of `generate` without its lines about speed, the numbers of correlation.txt; no logs."""
    if path.name == "correlation.txt":
        return {"numbers": [float(number) for number in re.findall(r"[-+]?\d+\.\d+", path.read_text())]}
    if not path.stem.startswith("generate"):
        return {}
    lines = path.read_text().splitlines()
    cut = next((i for i, line in enumerate(lines) if re.match(r"\d+ tokens", line)), len(lines))
    return {"text": "\n".join(lines[:cut]).strip()}


READERS = {
    ".csv": of_csv,
    ".json": lambda path: dict(numbers(json.loads(path.read_text()))),
    ".npz": of_npz,
    ".parquet": of_parquet,
    ".safetensors": of_safetensors,
    ".txt": of_text,
}
UNREAD = {".err", ".html", ".md", ".png", ".yaml"}
"""Prose, pictures and configurations: their numbers are in the files that are read."""


def same(one: object, two: object) -> bool:
    """Bit-equal, a NaN equal to a NaN."""
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        return one.shape == two.shape and one.dtype == two.dtype and one.tobytes() == two.tobytes()
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, float) and isinstance(two, float) and math.isnan(one):
        return math.isnan(two)
    return type(one) is type(two) and one == two


def difference(one: object, two: object) -> str:
    """The first place where two unequal values differ."""
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        if one.shape != two.shape or one.dtype != two.dtype:
            return f"{one.dtype} {one.shape} became {two.dtype} {two.shape}"
        at = int(np.flatnonzero(one.reshape(-1) != two.reshape(-1))[:1].sum())
        return f"[{at}] {one.reshape(-1)[at]} became {two.reshape(-1)[at]}"
    if isinstance(one, list) and isinstance(two, list):
        if len(one) != len(two):
            return f"{len(one)} rows became {len(two)}"
        at = next(i for i, pair in enumerate(zip(one, two, strict=True)) if not same(*pair))
        return f"row {at}: {one[at]!r} became {two[at]!r}"
    return f"{one!r} became {two!r}"


def renamed(name: str) -> list[str]:
    """`name` as OLD has it, then as NEW may have it."""
    parts = re.split(r"([./])", name)
    return [name, "".join(RENAMED.get(part, part) for part in parts), RENAMED.get(name, name)]


@dataclass
class Result:
    """Of one command: how much was compared, and what differs."""

    files: int = 0
    values: int = 0
    differences: list[str] = field(default_factory=list)
    intended: list[str] = field(default_factory=list)

    def differs(self, where: str, what: str) -> None:
        reason = next((why for pattern, why in INTENDED.items() if fnmatch.fnmatchcase(where, pattern)), None)
        target = self.differences if reason is None else self.intended
        target.append(f"{where}: {what}" + (f" ({reason})" if reason else ""))


def without(root: Path, value: object) -> object:
    """`value` with its paths seen from `root`."""
    if isinstance(value, list):
        return [without(root, inner) for inner in value]
    return value.replace(str(root), "") if isinstance(value, str) else value


def compare_file(old: Path, new: Path, label: str, result: Result) -> None:
    read = READERS[old.suffix]
    old_root, new_root = (path.parents[label.count("/")] for path in (old, new))
    after = read(new)
    result.files += 1
    for name, value in read(old).items():
        if UNSTEADY.search(name):
            continue
        result.values += np.size(value)
        there = next((other for other in renamed(name) if other in after), None)
        if there is None:
            result.differs(f"{label}:{name}", "is gone")
        elif not same(before := without(old_root, value), now := without(new_root, after[there])):
            result.differs(f"{label}:{name}", difference(before, now))


def files_of(folder: Path) -> dict[str, Path]:
    """Files by their place, a time stamp in a name replaced by `T`."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {re.sub(r"\d{8}[T_-]?\d{6}\w*", "T", str(path.relative_to(folder))): path for path in found}


def compare(old: Path, new: Path) -> dict[str, Result]:
    """Results by the folder that a command wrote."""
    results: dict[str, Result] = {}
    after = files_of(new)
    for label, path in files_of(old).items():
        top = label.split("/")[0] if not label.startswith("printed/") else path.stem
        if path.suffix in UNREAD or path.name.startswith(".") or top == "cache" or path.name == "env.json":
            continue
        result = results.setdefault(top, Result())
        there = next((after[name] for name in renamed(label) if name in after), None)
        if there is None:
            result.differs(label, "is gone")
        elif path.suffix in READERS:
            compare_file(path, there, label, result)
        else:
            result.differs(label, f"nothing reads {path.suffix} files; see READERS")
    return {name: result for name, result in results.items() if result.values or result.differences}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.same_numbers", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for what the commands write")
    given = parser.parse_args(arguments)
    for checkout in (given.old, given.new):
        if not (checkout / "headwise" / "__main__.py").is_file():
            parser.error(f"{checkout} is not a checkout of headwise: it has no headwise/__main__.py")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.keep or Path(temporary)
        shared = work / "shared"
        shared.mkdir(parents=True)
        shared_files(shared)
        with ThreadPoolExecutor(2) as pool:
            sides = [
                pool.submit(run_all, checkout.resolve(), shared, work / name)
                for name, checkout in (("old", given.old), ("new", given.new))
            ]
        failures = [side.result() for side in sides]
        results = compare(work / "old", work / "new")
    return show(results, *failures, time.monotonic() - begun)


def show(results: dict[str, Result], old: dict[str, str], new: dict[str, str], seconds: float) -> int:
    """Print the table; the exit code."""
    for name, result in results.items():
        state = "differs" if result.differences else "equal"
        print(f"{name:24} {state:8} {result.values:9,} numbers in {result.files} files")
        for line in result.differences[:20]:
            print(f"    {line}")
        if len(result.differences) > 20:
            print(f"    … and {len(result.differences) - 20} more")
        for line in result.intended:
            print(f"    meant: {line}")
    for side, failed in (("OLD", old), ("NEW", new)):
        for name, reason in failed.items():
            print(f"{name:24} failed in {side}: {reason}")
    wrong = [name for name, result in results.items() if result.differences] + [*old, *new]
    total = sum(result.values for result in results.values())
    verdict = f"{len(wrong)} parts differ or failed" if wrong else "all equal"
    print(f"{verdict}: {total:,} numbers of {len(COMMANDS)} commands in {seconds:.0f} s")
    return 1 if wrong or not total else 0


if __name__ == "__main__":
    sys.exit(main())
