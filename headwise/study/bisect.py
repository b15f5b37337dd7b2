"""Which commit made a measure worse: a search that runs what `headwise.analysis.bisection` asks for.

Every measurement is a run folder, `run@code=<commit>/seed_<n>`, so that a search that was killed continues,
and another search in the same folder uses what is there. A commit whose run fails is skipped and named.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from headwise.analysis.bisection import LEAST, Found, Step, next_step
from headwise.config.run import Config
from headwise.errors import HeadwiseError
from headwise.files import write_json
from headwise.runs.folder import RESULTS
from headwise.runs.read import Run
from headwise.study.code import LENGTH, refuse_newer
from headwise.study.executor import run_all, state
from headwise.study.expand import Place
from headwise.study.git import Commit, Repository
from headwise.study.local import Local
from headwise.study.plan import PlannedRun, configure, planned, refuse_other
from headwise.study.study import CODE, CRITERIA, LOWEST, Study
from headwise.training.distributed import find_device

VARIANT = "run"
ANSWER = "bisect.json"
FORMAT = 1
SIMULATED = {3.0: (0.992, 0.008), 2.0: (0.883, 0.028)}
"""Size of a regression in standard deviations of the runs -> share of 1,000 simulated histories of 64 commits
in which a search found the commit, and in which it named another: benchmarks/results/bisect-cpu.json."""
RELIABILITY = "how often such a search errs: of 1,000 simulated histories of 64 commits it " + "; ".join(
    f"found a regression of {size:g} standard deviations in {found:.1%}, and named another in {wrong:.1%}"
    for size, (found, wrong) in SIMULATED.items()
)
SEEDS_A_COMMIT = 2
"""Guess at the seeds that a commit takes, while none is settled."""

Show = Callable[[Sequence[PlannedRun]], None]


@dataclass
class Search:
    """A search between two commits.

    Attributes:
        study: the configuration of the runs; it has one variant and no axes.
        root: the study's folder lies in it.
        commits: hashes, oldest first: the good end, …, the bad end.
        metric: one of `CRITERIA`.
        most_seeds: after which a commit is given up.
        smallest: the smallest difference of the ends that matters.
        workers: runs at a time.
    """

    study: Study
    root: Path
    commits: list[str]
    metric: str
    most_seeds: int
    smallest: float = 0.0
    workers: int = 1
    measured: dict[tuple[int, int], float | None] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    _device: torch.device = field(init=False)
    _config: Config = field(init=False)

    def __post_init__(self) -> None:
        self._device = find_device(self.study.device)
        self._config = configure(self.study, self._place(0))
        self._runs: dict[tuple[int, int], PlannedRun] = {}
        self._no_value: dict[int, list[str]] = defaultdict(list)

    @property
    def repository(self) -> Repository:
        """Of the commits."""
        return Repository(str(self.study.code_repository))

    def commit(self, index: int) -> Commit:
        """A commit with its subject."""
        sha = self.commits[index]
        if sha not in self.study.commits:
            self.study.commits[sha] = Commit(sha, self.repository.subject(sha), sha)
        return self.study.commits[sha]

    def search(self, say: Callable[[str], None], show: Callable[[list[PlannedRun]], Any]) -> Found | None:
        """Run what is needed for the answer, or continue; None when Ctrl-C stopped it.

        Args:
            say: called with a line before each step.
            show: gives the display of runs for a context.

        Raises:
            HeadwiseError: an end cannot run or gives no value, or a run's process was killed.
        """
        while True:
            step = self._next()
            if step.found is not None:
                return step.found
            runs = [self.run(*pair) for pair in step.measure]
            known = [self._read(pair, run) for pair, run in zip(step.measure, runs, strict=True)]
            if any(known):
                continue  # runs of an earlier search, which may be all that is needed
            for number, pair in enumerate(step.measure, len(self.measured) + 1):
                say(f"run {number}: {self._about(pair, step)}")
            began = time.monotonic()
            with show(runs) as display:
                complete = run_all(runs, Local(min(self.workers, len(runs))), show=display)
            self.seconds += [(time.monotonic() - began) / len(runs)] * len(runs)
            if not complete:
                return None
            for pair, run in zip(step.measure, runs, strict=True):
                if not self._read(pair, run):
                    reason = run.folder.read_status().get("reason")
                    raise HeadwiseError(f"{run.folder.path} was interrupted: {reason}")

    def run(self, index: int, seed: int) -> PlannedRun:
        """The run of a commit with a seed."""
        if (index, seed) not in self._runs:
            refuse_newer(self.repository, self.commit(index))
            run = planned(self.study, self._place(index), self._config, seed, self.root, self._device)
            if run.skip:
                raise HeadwiseError(run.skip)
            refuse_other(run, "give another --out")
            self._runs[index, seed] = run
        return self._runs[index, seed]

    def summary(self, found: Found) -> dict[str, Any]:
        """What `bisect.json` holds."""
        rows: dict[int, dict[str, float | None]] = defaultdict(dict)
        for (index, seed), value in sorted(self.measured.items()):
            rows[index][str(seed)] = value
        return {
            "format": FORMAT, "metric": self.metric, "repository": self.repository.path,
            "good": self.commits[0], "bad": self.commits[-1], "between": len(self.commits) - 2,
            "first_worse": None if found.first_bad is None else self.commits[found.first_bad],
            "candidates": [self.commits[index] for index in found.candidates],
            "difference": asdict(found.difference), "runs": found.runs,
            "skipped": {self.commits[index]: why for index, why in found.skipped.items()},
            "measured": {self.commits[index]: values for index, values in rows.items()},
        }  # fmt: skip

    def write(self, found: Found) -> Path:
        """Write the answer into the search's folder."""
        path = self.root / self.study.name / ANSWER
        write_json(path, self.summary(found))
        return path

    def _next(self) -> Step:
        worse = "higher" if CRITERIA[self.metric] == LOWEST else "lower"
        return next_step(
            self.measured, len(self.commits), worse=worse, smallest=self.smallest, most_seeds=self.most_seeds,
            unrunnable=self.skipped,
        )  # fmt: skip

    def _place(self, index: int) -> Place:
        name = f"{VARIANT}@{CODE}={self.commits[index][:LENGTH]}"
        return Place(name, name, VARIANT, {CODE: self.commits[index]}, {})

    def _read(self, pair: tuple[int, int], run: PlannedRun) -> bool:
        """Take over what a run that ended gave; False where it has not ended."""
        now = state(run)
        if now not in (*RESULTS, "failed"):
            return False
        index, seed = pair
        status = run.folder.read_status()
        reason = f"{now}: {status.get('reason')}"
        value = Run(run.folder.path).get(self.metric) if now == "finished" else None
        if now == "failed":
            self.skipped[index] = f"{status.get('reason')} ({run.folder.path}; delete it to try again)"
        elif now == "finished" and value is None:
            self.skipped[index] = f"its runs have no {self.metric}"
        self.measured[pair] = None if value is None else float(value)
        if value is None and index in (0, len(self.commits) - 1):
            self._no_value[index].append(f"seed {seed} {reason}")
            if len(self._no_value[index]) >= LEAST and not self._values(index):
                end = "bad" if index else "good"
                why = "; ".join(self._no_value[index])
                raise HeadwiseError(f"the {end} end gives no {self.metric}: {why}; choose another")
        return True

    def _values(self, index: int) -> list[float]:
        return [value for (at, _), value in self.measured.items() if at == index and value is not None]

    def _about(self, pair: tuple[int, int], step: Step) -> str:
        index, seed = pair
        commit = self.commit(index)
        if step.low is None or step.high is None:
            left, about = len(self.commits) - 2, "comparing the ends"
        else:
            left, about = step.high - step.low - 1, "is it good or bad?"
        place = f"{commit.short} {commit.subject[:60]!r}, seed {seed}"
        return f"{place} ({about}); {left} commits left, {self._eta(left)}"

    def _eta(self, left: int) -> str:
        between: dict[int, int] = defaultdict(int)
        for index, _ in self.measured:
            if 0 < index < len(self.commits) - 1:
                between[index] += 1
        seeds = sum(between.values()) / len(between) if between else SEEDS_A_COMMIT
        runs = max(1, round(math.ceil(math.log2(left + 1)) * seeds))
        if not self.seconds:
            return f"about {runs} runs"
        seconds = runs * sum(self.seconds) / len(self.seconds)
        return f"about {runs} runs in {_time(seconds)}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
