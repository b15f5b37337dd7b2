"""`headwise report`: write the report of a study, a run, or a folder of runs, again."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Write report.md, report.html, report.json and figures; print the conclusions and where they are."""
    parser = argparse.ArgumentParser(
        prog="headwise report",
        description="Write report.md, report.html, report.json and figures/ from what the run folders hold.",
    )
    parser.add_argument("folder", help="a study folder, a run folder, or a folder with runs below it")
    parser.add_argument(
        "--baseline", metavar="VARIANT", help="compare with this variant, not the study's own"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the report (default: the folder read)")
    arguments = parser.parse_args(argv)

    from headwise.questions.sections import sections
    from headwise.report import build, conclusions

    paths = build(arguments.folder, baseline=arguments.baseline, out=arguments.out, sections=sections())
    print("\n".join(conclusions(paths["json"])))
    for name, path in paths.items():
        print(f"{name:<9} {path}")
    return 0
