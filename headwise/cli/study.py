"""`headwise study FILE.yaml`: run a study and write its report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.cli.executors import Where, add_executor_options, where_of
from headwise.errors import HeadwiseError
from headwise.files import alone, must_be_folder, sweep

if TYPE_CHECKING:
    from headwise.study.plan import PlannedRun
    from headwise.study.study import Study

LOCK = ".study.lock"
DESCRIPTION = (
    "Train variants x seeds x axes, compare the variants, and write report.md and report.html. Completed "
    "runs are not run again: after an interruption the same command continues the study."
)


def main(argv: list[str]) -> int:
    """Plan the study, run the runs that have not ended, write the report; returns the exit code."""
    arguments, flags = parser("study", DESCRIPTION).parse_known_args(argv)
    return carry_out(
        study_of(arguments, flags, f"headwise study {shlex.join(argv)}"),
        Path(arguments.out),
        only_plan=arguments.plan,
        where=where_of(arguments),
    )


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The parser of `study` and `sweep`."""
    found = argparse.ArgumentParser(
        prog=f"headwise {verb}",
        description=description,
        usage=f"headwise {verb} FILE [options] [--SECTION.KEY=VALUE ...]",
        epilog="Dotted keys set values for all runs (--model.d_model=768 --data.seq_len=1024), the budget "
        "(--budget.kind=tokens --budget.value=1e9), an axis (--axes.data.seq_len=[512,1024]), the search "
        "(--search.trials=8 --search.keys.training.lr=[1e-3,1e-2]) or a variant "
        "(--variants.NAME.training.lr=3e-4). A variant's own keys take precedence over shared ones. Another "
        "size is another study and needs its own --out.",
        allow_abbrev=False,
    )
    found.add_argument("file", help="study file; configs/studies has examples")
    found.add_argument("--out", default="runs", help="folder for the study's folder (default: runs)")
    found.add_argument("--size", help="one of the file's sizes, such as smoke, small or full")
    found.add_argument("--workers", type=int, help="maximum number of runs at a time")
    found.add_argument("--device", help="cpu, cuda or auto")
    found.add_argument("--seed", type=int, action="append", help="replaces the file's seeds; can be repeated")
    found.add_argument("--timeout-s", type=float, help="maximum training time of a run, in seconds")
    found.add_argument("--memory-limit", metavar="SIZE", help="memory limit of training, such as 24GiB")
    found.add_argument(
        "--max-length-at",
        metavar="SIZE",
        help="also find the longest sequence that each variant can train on within this memory",
    )
    add_executor_options(found)
    found.add_argument("--plan", action="store_true", help="list the runs and exit")
    return found


def study_of(arguments: argparse.Namespace, flags: list[str], command: str) -> Study:
    """The study of a command line, validated."""
    from headwise.study.code import locate
    from headwise.study.read import override, read_study

    study = read_study(arguments.file, arguments.size)
    for key, value in pairs(flags, "study"):
        override(study, key, value)
    study.workers = arguments.workers or study.workers
    study.device = arguments.device or study.device
    study.memory_limit = arguments.memory_limit or study.memory_limit
    study.max_length_at = arguments.max_length_at or study.max_length_at
    if arguments.seed:
        if study.search:
            raise HeadwiseError(
                "--seed has no effect on a study with a search; use --search.seeds and --search.confirm_seeds"
            )
        study.use_seeds(arguments.seed)
    study.timeout_s = arguments.timeout_s or study.timeout_s
    study.command = command
    study.validate()
    locate(study, Path(arguments.file).absolute().parent)
    return study


def pairs(flags: list[str], verb: str) -> Iterator[tuple[str, str]]:
    """Keys and values of `--key=value` and `--key value`.

    Raises:
        HeadwiseError: a flag of another form; names the verb's help.
    """
    rest = iter(flags)
    for flag in rest:
        key, equals, value = flag.removeprefix("--").partition("=")
        if not equals:
            value = next(rest, "")
        if not flag.startswith("--") or (not equals and (not value or value.startswith("--"))):
            raise HeadwiseError(f"{flag!r} is not --KEY=VALUE; `headwise {verb} --help` lists the options")
        yield key, value


def carry_out(study: Study, root: Path, *, only_plan: bool = False, where: Where | None = None) -> int:
    """Run a study, print its conclusions and the path of its report; returns the exit code.

    Args:
        where: where its runs are executed; on this machine by default.
    """
    from headwise import report
    from headwise.questions.sections import sections
    from headwise.runs.folder import RESULTS
    from headwise.study.code import moved
    from headwise.study.executor import state
    from headwise.study.lengths import search_lengths
    from headwise.study.plan import plan, still_to_come, waiting

    folder = root / study.name
    where = where or Where()
    where.check(study, root)
    must_be_folder(folder)
    if only_plan:
        _show_plan(
            plan(study, root, device=where.device(study)), waiting(study, root), still_to_come(study, root)
        )
        return 0
    with alone(folder / LOCK, f"works on the study {folder}"):
        sweep(folder)
        for line in moved(study, root):
            print(line, file=sys.stderr)
        complete, runs = _run(study, root, where)
        if complete and study.max_length_at:
            search_lengths(study, root)
        states = [state(run) for run in runs]
        if any(one in RESULTS for one in states) or (complete and "skipped" in states):
            paths = report.build(folder, sections=sections(), force=True)
            print("\n".join(report.conclusions(paths["json"])))
            print(f"report: {paths['html']}\n        {paths['markdown']}")
        elif complete:
            broken = [run for run in runs if state(run) in ("failed", "interrupted")]
            reason = next((run.folder.read_status().get("reason") for run in broken), "")
            raise HeadwiseError(f"no run of {folder} has a result; the first reason is: {reason}")
        pending = waiting(study, root)
    if not complete:
        print(f"stopped; completed work is kept. To continue: {study.command}", file=sys.stderr)
        return 130
    for name, reason in pending.items():
        print(f"{name} was not run: it {reason}", file=sys.stderr)
    compared = [one for run, one in zip(runs, states, strict=True) if not run.trial]
    fine = all(one in ("finished", "skipped", "out_of_memory") for one in compared)
    return 0 if fine and not pending else 1


def _run(study: Study, root: Path, where: Where) -> tuple[bool, list[PlannedRun]]:
    """Run everything, each stage after the variants it depends on; False if Ctrl-C stopped it, and all
    runs."""
    from headwise.study.display import StudyDisplay
    from headwise.study.executor import run_all
    from headwise.study.plan import plan, still_to_come, write_plan

    device = where.device(study)
    runs, folder = plan(study, root, device=device), root / study.name
    executor = where.executor(study, len(runs) + still_to_come(study, root), folder)
    display = StudyDisplay(len(runs))
    rows: dict[Path, Any] = {}
    before: list[PlannedRun] = []
    write_plan(study, runs, root, device)
    try:
        while True:
            display.total = len(runs) + still_to_come(study, root)
            complete = run_all(
                runs, executor, show=display, on_end=lambda: _write_table(folder, rows), before=before
            )
            more = plan(study, root, runs, device) if complete else runs
            write_plan(study, more, root, device)
            if len(more) == len(runs):
                return complete, runs
            before, runs = runs, more
    finally:
        display.close()


def _write_table(folder: Path, rows: dict[Path, Any]) -> None:
    """Write the table of all runs, so that it exists after a kill; `rows` caches the rows of ended runs."""
    from headwise.report.exports import write_sweep
    from headwise.runs.read import Study

    study = Study.read(folder)
    write_sweep(study.runs + study.trials, folder, folder, rows)


def _show_plan(runs: list[PlannedRun], pending: dict[str, str], more: int) -> None:
    from headwise.study.executor import state

    for run in runs:
        print(f"{run.folder.path}  {run.skip or state(run)}")
    for name, reason in pending.items():
        print(f"{name}  pending: {reason}")
    if more:
        print(f"{len(runs)} runs are planned; at most {more} more depend on their results")
