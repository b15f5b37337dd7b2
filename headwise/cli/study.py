"""`headwise study FILE.yaml`: run a study and write its report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from headwise.errors import HeadwiseError


def main(argv: list[str]) -> int:
    """Plan, run what has not ended, report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="headwise study",
        description="Train variants x seeds x axes, compare them, write report.md and report.html. "
        "Runs that ended are not run again: the same command goes on after an interruption.",
        usage="headwise study FILE [options] [--SECTION.KEY=VALUE ...]",
        epilog="Dotted keys change what all runs share (--model.d_model=768 --data.seq_len=1024), the budget "
        "(--budget.kind=tokens --budget.value=1e9), an axis (--axes.data.seq_len=[512,1024]) or a variant "
        "(--variants.NAME.training.lr=3e-4); what a variant sets itself stays otherwise. Another size is "
        "another study: give it an --out of its own.",
        allow_abbrev=False,
    )
    parser.add_argument("file", help="study file; configs/studies has some ready")
    parser.add_argument("--out", default="runs", help="folder for the study's folder (default: runs)")
    parser.add_argument("--workers", type=int, help="runs at a time")
    parser.add_argument("--device", help="cpu, cuda, auto")
    parser.add_argument("--seed", type=int, action="append", help="instead of the file's seeds; repeat")
    parser.add_argument("--timeout-s", type=float, help="seconds of training a run")
    parser.add_argument("--plan", action="store_true", help="show the runs and stop")
    arguments, rest = parser.parse_known_args(argv)
    overrides = list(_pairs(rest))

    from headwise.study.plan import override, read_study

    study = read_study(arguments.file)
    for key, value in overrides:
        override(study, key, value)
    study.workers = arguments.workers or study.workers
    study.device = arguments.device or study.device
    if arguments.seed:
        study.use_seeds(arguments.seed)
    study.timeout_s = arguments.timeout_s or study.timeout_s
    study.command = "headwise study " + shlex.join(argv)
    study.validate()
    return carry_out(study, Path(arguments.out), only_plan=arguments.plan)


def _pairs(flags: list[str]) -> Iterator[tuple[str, str]]:
    """Keys and values of `--key=value` and `--key value`."""
    rest = iter(flags)
    for flag in rest:
        key, equals, value = flag.removeprefix("--").partition("=")
        if not equals:
            value = next(rest, "")
        if not flag.startswith("--") or (not equals and (not value or value.startswith("--"))):
            raise HeadwiseError(f"{flag!r} is no --KEY=VALUE; `headwise study --help` lists the options")
        yield key, value


def carry_out(study, root: Path, *, only_plan: bool = False) -> int:  # type: ignore[no-untyped-def]
    """Run a study, print its conclusions and where its report is; 1 when no run came to a result."""
    from headwise import report
    from headwise.questions.sections import sections
    from headwise.study.display import StudyDisplay
    from headwise.study.local import ENDED, run_all, state
    from headwise.study.plan import plan, write_plan

    runs = plan(study, root)
    if only_plan:
        for run in runs:
            print(f"{run.folder.path}  {run.skip or state(run)}")
        return 0
    folder = write_plan(study, runs, root)
    display = StudyDisplay(len(runs))
    try:
        complete = run_all(runs, workers=study.workers, show=display)
    finally:
        display.close()
    states = [state(run) for run in runs]
    if any(one in ENDED for one in states) or (complete and "skipped" in states):
        paths = report.build(folder, sections=sections())
        print("\n".join(report.conclusions(paths["json"])))
        print(f"report: {paths['html']}\n        {paths['markdown']}")
    elif complete:
        reason = next((r.folder.read_status().get("reason") for r in runs if state(r) == "failed"), "")
        raise HeadwiseError(f"no run of {folder} came to a result: {reason}")
    if not complete:
        print(f"stopped; what was done is kept. To go on: {study.command}", file=sys.stderr)
        return 130
    return 0 if all(one in ("finished", "skipped") for one in states) else 1
