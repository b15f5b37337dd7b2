"""Runs and studies as folders: found by reading, judged by what their files say.

A run is any folder with a `status.json`, `summary.json` or `metrics.csv`; a study is a folder
with a `study.yaml`. Nothing else is kept anywhere, so nothing can disagree with the folders;
`index.py` caches what lists read, by the identity of the files.
Files are read when asked for. A damaged file makes the run's state `failed`, with the reason.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.names import place_inside
from headwise.runs.folder import STALE_S, STATES, known_format, state_of
from headwise.runs.log import Unreadable as Unreadable
from headwise.runs.log import is_plain_log, read_log, unreadable
from headwise.runs.schemas import Environment, Lengths, RunConfig, Status, StudyPlan, Summary

if TYPE_CHECKING:
    import polars

MARKS = ("status.json", "summary.json", "metrics.csv")


@dataclass(frozen=True)
class Run:
    """One run folder. `variant` and `seed` are its place in a study; None where unknown."""

    path: Path
    variant: str | None = None
    planned_seed: int | None = None
    plan: dict[str, Any] | None = None

    @cached_property
    def status(self) -> dict[str, Any]:
        """`status.json`; empty where absent. Raises `Unreadable`."""
        return _json(self.path / "status.json", Status, known_format("status.json", Unreadable))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`summary.json`; empty where absent. Raises `Unreadable`."""
        return _json(self.path / "summary.json", Summary, known_format("summary.json", Unreadable))

    @cached_property
    def env(self) -> dict[str, Any]:
        """`env.json`; empty where absent. Raises `Unreadable`."""
        return _json(self.path / "env.json", Environment)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.yaml`; empty where absent. Raises `Unreadable`."""
        return _yaml(self.path / "config.yaml", RunConfig)

    @cached_property
    def metrics(self) -> polars.DataFrame:
        """`metrics.csv`: `step` and `split`, every other column float64, empty cells null.

        A last line without its newline (the process was killed while writing) is dropped; of a
        step that was repeated after a resume the later line counts. Raises `Unreadable`.
        """
        return read_log(self.path / "metrics.csv")

    @cached_property
    def heads(self) -> polars.DataFrame | None:
        """The head table; None where the run wrote none. Raises `Unreadable`."""
        return self._table("heads")

    @cached_property
    def entanglement(self) -> polars.DataFrame | None:
        """Measures of windows (`measure.entanglement`); None where the run has none. Raises `Unreadable`."""
        return self._table("entanglement")

    def _table(self, name: str) -> polars.DataFrame | None:
        from headwise.measures import table as head_table

        folder = self.path / name
        if not any(folder.glob("*.parquet")):
            return None
        try:
            return head_table.read(folder)
        except HeadwiseError as error:
            raise Unreadable(f"unreadable {name}: {error}") from error

    @cached_property
    def problem(self) -> str | None:
        """Why the run cannot be used, where one of its files is damaged or missing."""
        for name in ("status", "summary", "config", "env", "metrics"):
            try:
                if name != "metrics" or not is_plain_log(self.path / "metrics.csv"):
                    getattr(self, name)
            except Unreadable as error:
                return str(error)
        if self.status.get("state") == "finished" and not self.summary:
            return "unreadable summary.json: it is missing although the run finished"
        return None

    @cached_property
    def _verdict(self) -> tuple[str, str]:
        if self.problem:
            return "failed", self.problem
        status = self.status or self.summary
        if not status:
            waits = str((self.plan or {}).get("waits") or "")
            return ("interrupted", "no status.json") if self.path.exists() else ("planned", waits)
        state, reason = str(status.get("state")), str(status.get("reason") or "")
        if state not in STATES:
            return "failed", f"unreadable status.json: state {state!r} is not known"
        try:
            if state == "running" and state_of(self.status) == "interrupted":
                return "interrupted", _silence(self.status)
        except TypeError:
            return "failed", "unreadable status.json: its heartbeat or pid is no number"
        return state, reason

    @property
    def state(self) -> str:
        """One of `run_folder.STATES`; `running` without a sign of life reads as `interrupted`."""
        return self._verdict[0]

    @property
    def reason(self) -> str:
        """Why the run is in its state; empty where there is nothing to say."""
        return self._verdict[1]

    @property
    def seed(self) -> int | None:
        """The seed, from the summary, the folder's name or the configuration."""
        found = self.get("seed")
        return int(found) if found is not None else None

    def get(self, name: str) -> Any:
        """One value by name: a field of the summary, else of what else the folder tells, else None."""
        if name in ("state", "reason"):
            return getattr(self, name)
        if name in ("variant", "path"):
            return str(self.path) if name == "path" else self.variant
        for read in (self._from_summary, self._from_folder, self._from_files):
            value = read(name)
            if value is not None:
                return value
        return None

    def _from_summary(self, name: str) -> Any:
        try:
            summary = self.summary
        except Unreadable:
            return None
        if name.startswith("val_") and summary.get("val_step") not in (None, summary.get("step")):
            return None  # of a step before the last: not what the run came to
        return summary.get(name)

    def _from_folder(self, name: str) -> Any:
        if name == "seed":
            suffix = self.path.name.removeprefix("seed_")
            return self.planned_seed if self.planned_seed is not None else _int(suffix)
        return (self.plan or {}).get(name)

    def _from_files(self, name: str) -> Any:
        if name not in ("step", "max_steps"):
            return self.facts.get(name)
        try:
            return self.status.get(name)
        except Unreadable:
            return None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What `get` takes from env.json and config.yaml: values on top, the kind, the data's checksum."""
        found: dict[str, Any] = {}
        with suppress(Unreadable):
            config = self.config
            found |= {key: value for key, value in config.items() if not isinstance(value, dict)}
            kind = config.get("model", {}).get("attention", {}).get("kind")
            found |= {} if kind is None else {"kind": kind}
        with suppress(Unreadable):
            found |= self.env
            checksum = self.env.get("data", {}).get("checksum")
            found |= {} if checksum is None else {"data_checksum": checksum}
        return found

    def curve(self, split: str, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,) and values (n,) of one column of `metrics.csv`, where it is not empty."""
        frame = self.metrics
        if column not in frame.columns:
            return np.empty(0, np.int64), np.empty(0)
        rows = frame.filter(frame["split"] == split).drop_nulls(column)
        return rows["step"].to_numpy(), rows[column].to_numpy()

    def maps(self) -> Path | None:
        """The latest file of attention maps; None where the run wrote none."""
        files = sorted((self.path / "maps").glob("step_*.npz"))
        return files[-1] if files else None


@dataclass(frozen=True)
class Study:
    """A study's plan and its runs; a folder without a plan is a study of what lies in it."""

    path: Path
    plan: dict[str, Any]
    runs: list[Run]

    @property
    def name(self) -> str:
        """The study's name; the folder's where the plan has none."""
        return str(self.plan.get("name") or self.path.resolve().name)

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """Plan of each variant by name, in the plan's order."""
        return self.plan.get("variants") or {}

    @property
    def baseline(self) -> str | None:
        """The variant that the others are compared with."""
        return self.plan.get("baseline")

    @cached_property
    def trials(self) -> list[Run]:
        """The runs that a search tried out, which are compared with nothing, and what it was without one."""
        search = self.plan.get("search") or {}
        found = []
        for unit in (search.get("units") or {}).values():
            tried = [(trial["folder"], search["seeds"]) for trial in unit["trials"]]
            for folder, seeds in [*tried, (unit["default"], search["confirm_seeds"])]:
                if folder is not None:
                    home = place_inside(self.path, folder, f"{self.path / 'study.yaml'}")
                    found += [Run(home / f"seed_{seed}", folder, seed) for seed in seeds]
        return found

    @classmethod
    def read(cls, path: str | Path) -> Study:
        """Read a study folder, a single run folder, or any folder with runs somewhere below.

        Raises:
            HeadwiseError: there is no such folder, no run in it, or `study.yaml` is damaged or of a newer
                headwise.
        """
        path = Path(path)
        if not path.is_dir():
            raise HeadwiseError(f"no folder {str(path)!r}: give a study folder or a run folder")
        if (path / "study.yaml").is_file():
            try:
                plan = read_plan(path)
            except Unreadable as error:
                raise HeadwiseError(f"{path}: {error}") from error
            return cls(path, plan, list(_planned_runs(path, plan)))
        runs = find_runs(path)
        if not runs:
            raise HeadwiseError(f"no runs below {str(path)!r}: a run is a folder with a status.json")
        return _study_of(path, runs)

    @classmethod
    def read_all(cls, paths: Sequence[str | Path]) -> Study:
        """The runs of several folders as one study, with the baseline and the criteria of the first.

        Variants of one name are one where their runs lie in one folder; others carry their study's name.

        Raises:
            HeadwiseError: as `read`.
        """
        studies = [cls.read(path) for path in paths]
        if len(studies) == 1:
            return studies[0]
        homes: dict[str, set[Path]] = {}
        for study in studies:
            for run in study.runs:
                homes.setdefault(str(run.variant), set()).add(_home(run))
        variants: dict[str, dict[str, Any]] = {}
        runs: dict[Path, Run] = {}
        first = studies[0]
        for study in studies:

            def name_of(variant: str | None, study: Study = study) -> str:
                alone = len(homes.get(str(variant), ())) < 2
                return str(variant) if alone else f"{study.name}/{variant}"

            for variant, plan in study.variants.items():
                against = {"against": name_of(plan["against"])} if (plan or {}).get("against") else {}
                variants.setdefault(name_of(variant), (plan or {}) | against)
            for run in study.runs:
                path = run.path.absolute()
                runs.setdefault(path, Run(path, name_of(run.variant), run.planned_seed, run.plan))
            if study is first:
                baseline = name_of(study.baseline)
        root = Path(os.path.commonpath([run.path.parent for run in runs.values()]))
        kept = {key: first.plan[key] for key in ("criteria", "smallest_difference") if key in first.plan}
        title = f"Runs of {', '.join(dict.fromkeys(study.name for study in studies))}"
        plan = kept | {"name": root.name, "title": title, "variants": variants, "baseline": baseline}
        return cls(root, plan, list(runs.values()))


def longest_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of max_lengths.json of the studies that the runs are of; none where nothing was searched."""
    found: list[dict[str, Any]] = []
    for folder in dict.fromkeys(run.path.parent.parent for run in runs):
        with suppress(reading.Unreadable):  # the search tells what is wrong with it
            found += reading.read_json(folder / "max_lengths.json", Lengths)["rows"]
    return found


def _home(run: Run) -> Path:
    """The folder of a run's variant."""
    path = run.path.resolve()
    return path.parent if _in_seed_folder(path) else path


def read_plan(folder: Path) -> dict[str, Any]:
    """`study.yaml` of a study's folder; empty where there is none.

    Raises:
        Unreadable: it is damaged.
        HeadwiseError: a newer headwise wrote it.
    """
    path = folder / "study.yaml"
    return _yaml(path, StudyPlan, known_format(path))


def find_runs(root: str | Path) -> list[Run]:
    """Every run folder at or below `root`, ordered by path; folders inside a run are not searched."""
    return [run_at(Path(folder)) for folder in _run_folders(str(root))]


def run_at(path: Path) -> Run:
    """The run of a folder that is in no study's plan."""
    return Run(path, path.parent.name if _in_seed_folder(path) else None)


def _run_folders(root: str) -> Iterator[str]:
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        inside: list[str] = []
        is_run = False
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    is_run = is_run or entry.name in MARKS
                elif not entry.name.startswith(".") and not entry.is_symlink():
                    inside.append(entry.name)
        if is_run:
            yield folder
        else:
            waiting += [os.path.join(folder, name) for name in sorted(inside, reverse=True)]


def _planned_runs(path: Path, plan: dict[str, Any]) -> Iterator[Run]:
    for variant, details in (plan.get("variants") or {}).items():
        seeds = (details or {}).get("seeds") or plan.get("seeds") or []
        home = place_inside(path, variant, f"{path / 'study.yaml'}")
        for seed in seeds:
            place_inside(home, f"seed_{seed}", f"{path / 'study.yaml'}")
            yield Run(home / f"seed_{seed}", variant, seed, details)
        for folder in sorted(home.glob("seed_*")):
            if _int(folder.name.removeprefix("seed_")) not in seeds and _is_run(folder):
                yield Run(folder, variant, None, details)


def _study_of(path: Path, runs: list[Run]) -> Study:
    """A study of loose runs: folders `<variant>/seed_<n>` are variants, others stand alone."""

    def variant(run: Run) -> str:
        folder = run.path.parent if _in_seed_folder(run.path) else run.path
        inside = folder.relative_to(path).as_posix() if folder.is_relative_to(path) else "."
        return folder.resolve().name if inside == "." else inside

    named = [Run(run.path, variant(run)) for run in runs]
    variants: dict[str, dict[str, Any]] = {}
    for run in named:
        details = {"label": run.variant, "kind": run.get("kind")}
        variants.setdefault(str(run.variant), {}).update({k: v for k, v in details.items() if v})
    seeds = sorted({run.seed for run in named if run.seed is not None})
    flash = [name for name, details in variants.items() if details.get("kind") == "flash"]
    plan = {
        "name": path.resolve().name,
        "variants": variants,
        "seeds": seeds,
        "baseline": flash[0] if flash else next(iter(variants)),
    }
    return Study(path, plan, named)


def _in_seed_folder(path: Path) -> bool:
    return path.name.startswith("seed_")


def _is_run(path: Path) -> bool:
    return any((path / mark).is_file() for mark in MARKS)


def _silence(status: dict[str, Any]) -> str:
    """What shows that a run that says `running` does not run."""
    age = time.time() - status.get("heartbeat", 0)
    if age < STALE_S:
        return f"its process {status.get('pid')} is gone"
    return f"no sign of life for {age:.0f} s" if "heartbeat" in status else "no heartbeat recorded"


def _json(path: Path, schema: Any, accept: Callable[[Any], None] | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {}
    with unreadable():
        content = reading.read_json(path, schema, accept=accept)
    return content


def _yaml(path: Path, schema: Any, accept: Callable[[Any], None] | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {}
    with unreadable():
        content = reading.read_yaml(path, schema, accept=accept)
    return content


def _int(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text) else None  # "²" is a digit and not a number
