"""`headwise bisect --good REV --bad REV`: the commit that made a measure worse."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.errors import HeadwiseError, in_range, one_of
from headwise.files import alone, must_be_folder, sweep

if TYPE_CHECKING:
    from headwise.analysis.bisection import Found
    from headwise.analysis.statistics import Summary
    from headwise.study.bisect import Search
    from headwise.study.display import StudyDisplay
    from headwise.study.plan import PlannedRun
    from headwise.study.study import Study

DESCRIPTION = (
    "Find the first commit between two whose runs are worse beyond the noise of their seeds. Each run "
    "executes one commit in a working tree of its own; yours is left as it is. Commits are tried along first "
    "parents, with as many seeds as the noise needs. After an interruption the same command continues."
)
SET_BY_SEARCH = ("seed", "out")
"""Keys of a configuration that the search sets in every run."""


def main(argv: list[str]) -> int:
    """Search, print the answer; returns the exit code: 1 where no single commit is the answer."""
    arguments, flags = _parser().parse_known_args(argv)
    search = _search_of(arguments, flags)
    folder = search.root / search.study.name
    must_be_folder(folder)
    from headwise.cli.study import LOCK

    with alone(folder / LOCK, f"searches in {folder}"):
        sweep(folder)
        print(f"{len(search.commits) - 2} commits lie between; runs are in {folder}", file=sys.stderr)
        found = search.search(lambda line: print(line, file=sys.stderr, flush=True), _display)
        if found is None:
            command = f"headwise bisect {shlex.join(argv)}"
            print(f"stopped; finished runs are kept. To continue: {command}", file=sys.stderr)
            return 130
        path = search.write(found)
    print("\n".join(_conclusion(search, found)))
    print(f"numbers: {path}")
    return 0 if found.first_bad is not None else 1


def _parser() -> argparse.ArgumentParser:
    from headwise.analysis.bisection import MOST_SEEDS

    found = argparse.ArgumentParser(
        prog="headwise bisect",
        description=DESCRIPTION,
        usage="headwise bisect --good REV --bad REV [options] [--SECTION.KEY=VALUE ...]",
        epilog="Dotted keys change the configuration of all runs (--training.lr=1e-3) or their budget "
        "(--budget.kind=tokens --budget.value=1e6). A commit is given the keys that FILE and the command "
        "line name; its own defaults hold for all others.",
        allow_abbrev=False,
    )
    add = found.add_argument
    add("--good", required=True, metavar="REV", help="a commit whose runs are good: an ancestor of --bad")
    add("--bad", required=True, metavar="REV", help="a later commit whose runs are worse")
    add("--metric", default="val_loss", help="what is compared (default: val_loss)")
    add("--config", metavar="FILE", help="configuration of the runs; its seed and out are not used")
    add("--repository", metavar="PATH", help="of the commits (default: that of the current folder)")
    add("--seeds-at-most", type=int, default=MOST_SEEDS, metavar="N",
        help=f"seeds after which a commit is given up as undecided (default: {MOST_SEEDS})")  # fmt: skip
    add("--smallest-difference", type=float, default=0.0, metavar="X",
        help="of the ends that matters; the search ends when the difference must be smaller")  # fmt: skip
    add("--out", default="runs/bisect", help="folder of the runs (default: runs/bisect)")
    add("--workers", type=int, default=1, help="runs at a time (default: 1)")
    add("--device", help="cpu, cuda, auto")
    add("--timeout-s", type=float, help="seconds of training per run")
    return found


def _search_of(arguments: argparse.Namespace, flags: list[str]) -> Search:
    from headwise.analysis.bisection import LEAST
    from headwise.study.bisect import Search
    from headwise.study.code import import_from, refuse_newer, settle
    from headwise.study.git import Repository
    from headwise.study.study import CRITERIA

    one_of("--metric", arguments.metric, CRITERIA)
    in_range("--seeds-at-most", arguments.seeds_at_most, LEAST, 10_000)
    in_range("--smallest-difference", arguments.smallest_difference, 0, 1e9)
    in_range("--workers", arguments.workers, 1, 2**10)
    repository = Repository.around(arguments.repository or Path.cwd())
    good, bad = repository.commit(arguments.good), repository.commit(arguments.bad)
    for end in (good, bad):
        refuse_newer(repository, end)
    commits = repository.history(good, bad)
    import_from(repository)
    study = _study_of(arguments, flags)
    ends = [dataclasses.replace(end, written=end.sha) for end in (good, bad)]
    settle(study, repository, ends)
    if study.code_dirty:
        print(f"{repository.path} has changes that are not committed; no run contains them", file=sys.stderr)
    root = Path(os.path.abspath(arguments.out)).parent
    return Search(
        study, root, commits, arguments.metric, arguments.seeds_at_most, arguments.smallest_difference,
        arguments.workers,
    )  # fmt: skip


def _study_of(arguments: argparse.Namespace, flags: list[str]) -> Study:
    """A study of one variant with the configuration of the command line."""
    from headwise import reading
    from headwise.attention.kinds import load_plugins
    from headwise.cli.study import pairs
    from headwise.study.bisect import VARIANT
    from headwise.study.read import override
    from headwise.study.study import Study, Variant

    values: Any = {}
    if arguments.config:
        path = Path(arguments.config)
        values = reading.read_yaml(path) or {}
        if not isinstance(values, dict):
            raise HeadwiseError(f"--config {path} is no YAML of keys and values")
        plugins = reading.check(values.pop("plugins", None) or [], list[str])
        load_plugins(plugins, recorded_in=str(path) if path.name == "config.yaml" else None)
    from headwise.attention.kinds import LOADED

    base = {key: value for key, value in values.items() if key not in SET_BY_SEARCH}
    device = str(base.pop("device", "auto"))
    study = Study(
        Path(os.path.abspath(arguments.out)).name, plugins=list(LOADED), base=base,
        variants={VARIANT: Variant()}, seeds=[0], timeout_s=arguments.timeout_s,
        device=arguments.device or device,
    )  # fmt: skip
    for key, value in pairs(flags, "bisect"):
        override(study, key, value)
    if study.axes:
        raise HeadwiseError(f"a search has no axes; leave out --axes.{next(iter(study.axes))}")
    study.validate()
    return study


@contextmanager
def _display(runs: list[PlannedRun]) -> Iterator[StudyDisplay]:
    from headwise.study.display import StudyDisplay

    display = StudyDisplay(len(runs))
    try:
        yield display
    finally:
        display.close()


def _conclusion(search: Search, found: Found) -> Iterator[str]:
    """The answer, line by line."""
    from headwise.study.bisect import RELIABILITY

    yield from _measured(search, found)
    if found.first_bad is not None:
        commit = search.commit(found.first_bad)
        yield f"first worse commit: {commit.sha}"
        yield f"                    {commit.subject}"
    elif found.candidates:
        yield f"the first worse commit is one of {len(found.candidates)}, the earlier of which were skipped:"
        for index in found.candidates:
            commit = search.commit(index)
            yield f"  {commit.short} {commit.subject}{' (skipped)' if index in found.skipped else ''}"
    else:
        yield found.why
    if found.difference.n:
        yield f"{search.metric}, bad end - good end: {_interval(found.difference)}"
    seeds = max(
        (len({s for i, s in search.measured if i == index}) for index, _ in search.measured), default=0
    )
    commits = len({index for index, _ in search.measured})
    yield f"{found.runs} runs of {commits} commits, at most {seeds} seeds a commit"
    if found.candidates:
        yield RELIABILITY


def _measured(search: Search, found: Found) -> Iterator[str]:
    yield f"{'commit':<10}{'seeds':>5}  {'mean ' + search.metric:>16}  subject"
    for index in sorted({index for index, _ in search.measured}):
        values = [v for (at, _), v in search.measured.items() if at == index and v is not None]
        mean = f"{sum(values) / len(values):.6g}" if values else "none"
        commit = search.commit(index)
        why = f"  skipped: {found.skipped[index]}" if index in found.skipped else ""
        yield f"{commit.short:<10}{len(values):>5}  {mean:>16}  {commit.subject}{why}"


def _interval(difference: Summary) -> str:
    seeds = f"{difference.n} seed{'s' * (difference.n != 1)}"
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.5g} over {seeds}, which are too few for an interval"
    return (
        f"{difference.mean:+.5g} [{difference.low:+.5g}, {difference.high:+.5g}] over {seeds}, "
        "an interval of 95% that holds at every look"
    )
