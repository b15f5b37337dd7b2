"""`headwise report`: write the report of a study, a run or folders of runs."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str]) -> int:
    """Write the report, its figures and its tables; print the conclusions and the paths."""
    parser = argparse.ArgumentParser(
        prog="headwise report",
        description="Write report.md, report.html, report.json, figures/, sweep_results.csv and "
        "all_results.parquet from run folders.",
    )
    parser.add_argument("runs", nargs="+", help="study folders, run folders, or folders with runs below them")
    parser.add_argument(
        "--baseline", metavar="VARIANT", help="compare with this variant instead of the study's baseline"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the report (default: the input folder)")
    parser.add_argument(
        "--force",
        action="store_true",
        help="include runs whose data differs from the baseline's, with a flag",
    )
    parser.add_argument("--pdf", action="store_true", help="also write report.pdf, with a browser or pandoc")
    arguments = parser.parse_args(argv)

    from headwise.errors import HeadwiseError
    from headwise.questions.sections import sections
    from headwise.report import build, conclusions
    from headwise.report.pdf import write_pdf

    paths = build(
        arguments.runs,
        baseline=arguments.baseline,
        out=arguments.out,
        sections=sections(),
        force=arguments.force,
    )
    print("\n".join(conclusions(paths["json"])))
    if arguments.pdf:
        try:
            paths["pdf"] = write_pdf(paths["html"], paths["markdown"])
        except HeadwiseError as error:
            print(error, file=sys.stderr)
    for name, path in paths.items():
        print(f"{name:<9} {path}")
    return 0
