"""`headwise budget`: the loss of runs against the share of the context they may keep."""

from __future__ import annotations

import argparse
from pathlib import Path

from headwise.files import must_be_folder

DEFAULT = (1.0, 0.5, 0.25, 0.125, 0.0625)


def main(argv: list[str]) -> int:
    """Measure, print the table, write the report; returns the exit code."""
    args = _parser().parse_args(argv)

    out = Path(args.out) if args.out else Path(args.runs[0]) / "budget"
    must_be_folder(out)

    from headwise.questions.budget.measure import Options, measure

    options = Options(
        tuple(args.budgets), args.sequences, args.readmit, args.greedy, args.calibration, args.device
    )
    data = measure(args.runs, options, baseline=args.baseline)

    from headwise.bench.harness import print_table
    from headwise.questions.budget.page import statements, table, write

    found = table(data)
    print_table([dict(zip(found.headers, row, strict=True)) for row in found.rows])
    print("\n".join(statements(data)))
    for note in data["notes"]:
        print(f"note: {note}")
    for path in write(data, out).values():
        print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwise budget",
        description="Validation loss against the share of the context that every layer keeps. Selective runs "
        "drop the keys they masked most, for good; others keep a window over their last keys.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders, or folders with runs (seeds, variants) in them")
    add("--budgets", nargs="+", type=float, default=list(DEFAULT), metavar="SHARE",
        help="shares of the context, above 0 and at most 1 (default: 1.0 0.5 0.25 0.125 0.0625)")  # fmt: skip
    add("--baseline", metavar="RUN", help="whose full context is the mark (default: a flash run among RUN)")
    add("--sequences", type=int, default=128, metavar="N", help="validation sequences (%(default)s)")
    add("--readmit", action="store_true", help="also let every query choose anew, so that keys return")
    add("--greedy", action="store_true", help="also choose a budget for each layer")
    add("--calibration", type=int, default=16, metavar="N",
        help="validation sequences that choose budgets of layers (%(default)s)")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda, cuda:1, or auto")
    add("--out", metavar="DIR", help="folder of the report (default: RUN/budget of the first)")
    return parser
