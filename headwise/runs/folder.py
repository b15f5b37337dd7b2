"""The run folder: everything a run leaves behind, found and read without a server or a registry.

config.yaml env.json metrics.csv heads/ entanglement/ maps/ checkpoints/step_<n>/ status.json summary.json
log.txt

status.json and summary.json carry the number of the format; a folder without one is of format 0. Older
formats are read whole and resumed: a column of metrics.csv that did not exist is empty. Newer ones are left
alone.
"""

from __future__ import annotations

import csv
import io
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import (
    is_draft,
    no_folder,
    replacing,
    shortened,
    sweep,
    write_json,
    write_text,
    writing,
)
from headwise.reading.csvfile import LIMIT as CSV_LIMIT
from headwise.runs.schemas import Environment, Status, Summary

FORMAT = 1
"""Of the files of a run folder and of a study's plan; 0 had no number."""

STATES = (
    "planned", "running", "interrupted", "finished", "failed", "timed_out", "diverged", "out_of_memory",
    "skipped",
)  # fmt: skip
"""The states of a run, everywhere the same words."""

RESULTS = ("finished", "timed_out", "diverged", "out_of_memory")
"""States that are results: a study does not run such a run again."""

HEARTBEAT_S = 5.0
STALE_S = 60.0

METRICS = (
    "step", "split", "loss", "tokens_per_sec", "step_time_ms", "vram_mb", "grad_norm", "lr", "flops",
    "bits_per_byte", "perplexity", "accuracy", "smooth_loss", "tokens", "flops_per_sec", "data_wait",
    "penalty",
)  # fmt: skip
"""Columns of metrics.csv; a value that does not apply is empty."""

_LONGEST_LINE = 1 << 16

BEGINNING = ("status.json", "log.txt")
"""Files that a run may leave when it ends before its config.yaml is in place."""


class Outdated(HeadwiseError):
    """Another worker was given the run; this one writes nothing any more."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and whole-file writes of one run.

    Attributes:
        path: the folder.
        attempt: of the worker that writes, as `take` numbered it; None for one that nobody numbered.
    """

    path: Path
    attempt: int | None = None

    @property
    def config(self) -> Path:
        """The complete, re-runnable configuration."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """What it ran on: versions, device, data."""
        return self.path / "env.json"

    @property
    def heads(self) -> Path:
        """The head table's parts."""
        return self.path / "heads"

    @property
    def entanglement(self) -> Path:
        """Parts of measures of windows, in the head table's form."""
        return self.path / "entanglement"

    @property
    def maps(self) -> Path:
        """Attention maps of fixed prompts."""
        return self.path / "maps"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The log of measurements, one row each."""
        return self.path / "metrics.csv"

    @property
    def summary(self) -> Path:
        """The final numbers, written last."""
        return self.path / "summary.json"

    @property
    def log(self) -> Path:
        """What was said while it ran."""
        return self.path / "log.txt"

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return os.path.exists(self.config)  # a name that is too long holds none

    def refuse_taken(self) -> None:
        """Refuse to start a run here when something else is; what a run left that ended at once is taken up.

        Raises:
            HeadwiseError: the folder cannot be one, or holds another run or other files.
        """
        if self.holds_run():
            raise HeadwiseError(
                f"{self.path} holds another run; pass --resume to continue it, or another --out"
            )
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise HeadwiseError(f"{self.path} exists and is no run folder; pass another --out")
        if reason := no_folder(self.path):
            raise HeadwiseError(f"cannot write to --out {shortened(self.path)}: {reason}; pass another --out")
        if not self.path.is_dir():
            return
        if not self._only(*BEGINNING, drafts=True):
            raise HeadwiseError(f"{self.path} exists and is no run folder; pass another --out")
        sweep(self.path)
        if not self._only(*BEGINNING) or state_of(self.read_status()) == "running":
            raise HeadwiseError(f"another process is starting a run in {self.path}; pass another --out")

    def _only(self, *names: str, drafts: bool = False) -> bool:
        """Whether nothing but these files lies in the folder."""
        return all(name in names or (drafts and is_draft(name)) for name in os.listdir(self.path))

    def start(self, config_yaml: str) -> None:
        """Claim the folder for a run.

        Raises:
            HeadwiseError: the folder cannot be written, or holds another run or other files.
        """
        self.refuse_taken()
        try:
            write_text(self.config, config_yaml)
        except OSError as error:
            raise HeadwiseError(f"cannot write to --out {self.path}: {error.strerror}") from error

    def refuse_newer(self) -> None:
        """Refuse a folder that a newer headwise wrote, before anything in it is changed.

        Raises:
            HeadwiseError: its format is newer than this headwise knows.
        """
        for path in (self.path / "status.json", self.summary):
            with suppress(reading.Unreadable):  # told of by whoever needs them
                reading.read_json(path, accept=known_format(path))

    def read_status(self) -> dict[str, Any]:
        """status.json as it stands, or `{"state": "planned"}`.

        Raises:
            HeadwiseError: it is damaged, or of a newer headwise.
        """
        path = self.path / "status.json"
        try:
            status: dict[str, Any] = reading.read_json(path, Status, accept=known_format(path))
            return {"state": "planned"} | status
        except reading.Missing:
            return {"state": "planned"}
        except reading.Unreadable as error:
            raise error.so("delete it, and the run counts as planned") from error

    def write_status(self, state: str, **values: Any) -> None:
        """Replace status.json, keeping earlier values that are not given again."""
        if state not in STATES:
            raise ValueError(f"{state!r} is not one of {STATES}")
        before = self.read_status()
        self._refuse_outdated(before)
        status = before | {
            "state": state, "pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time(),
            "format": FORMAT,
        }  # fmt: skip
        if self.attempt is not None:
            status["attempt"] = self.attempt
        write_json(self.path / "status.json", status | values)

    def take(self) -> int:
        """Number the next attempt at the run; a worker with an earlier number writes nothing from now on.

        Until the new worker writes, `pid` is None.

        Raises:
            HeadwiseError: the status is damaged, or cannot be written.
        """
        status = self.read_status()
        attempt: int = (status.get("attempt") or 0) + 1
        taken = {"state": state_of(status), "attempt": attempt, "pid": None, "format": FORMAT}
        write_json(self.path / "status.json", status | taken)
        return attempt

    def refuse_outdated(self) -> None:
        """Refuse to go on where another worker was given the run.

        Raises:
            Outdated: that is so.
        """
        if self.attempt is not None:
            self._refuse_outdated(self.read_status())

    def _refuse_outdated(self, status: dict[str, Any]) -> None:
        now = status.get("attempt") or 0
        if self.attempt is not None and now > self.attempt:
            raise Outdated(f"{self.path} was given to another worker (attempt {now}, this is {self.attempt})")

    def read_summary(self) -> dict[str, Any]:
        """summary.json.

        Raises:
            HeadwiseError: it is missing or damaged.
        """
        return _read_json(self.summary, Summary)

    def read_environment(self) -> dict[str, Any]:
        """env.json.

        Raises:
            HeadwiseError: it is missing or damaged.
        """
        return _read_json(self.environment, Environment)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the last file of a run."""
        self.refuse_outdated()
        write_json(self.summary, summary | {"format": FORMAT})

    def append_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows to metrics.csv in one write; a file with fewer columns gets the others first.

        Raises:
            HeadwiseError: the disk is full, or the file is damaged.
            Outdated: another worker was given the run.
        """
        self.refuse_outdated()
        fresh = not self.metrics.exists() or self.metrics.stat().st_size == 0
        if not fresh and not set(METRICS) <= set(self._columns()):
            self._rewrite(self.read_metrics())
        with _appending(self.metrics) as file:
            writer = csv.DictWriter(file, METRICS if fresh else self._columns())
            if fresh:
                writer.writeheader()
            for row in rows:
                writer.writerow({k: "" if v is None else v for k, v in row.items()})

    def read_metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv, `METRICS` first; a column that the file does not have is empty.

        A last line that a kill cut short is left out.

        Raises:
            HeadwiseError: a line cannot be read; names it.
        """
        try:
            text = reading.read_text(self.metrics, limit=CSV_LIMIT)
        except reading.Missing:
            return []
        except reading.Unreadable as error:
            raise error.so("it was left as it is") from error
        whole = text[: text.rfind("\n") + 1]
        try:
            lines = list(csv.reader(io.StringIO(whole, newline="")))
        except csv.Error as error:
            raise HeadwiseError(f"{self.metrics} is no CSV ({error}); it was left as it is") from error
        if not lines and text and not re.fullmatch(r"s|st|ste|step[a-z_,]*", text):
            raise self._damaged(1, "it does not begin with the column step")
        if not lines:
            return []
        columns = lines[0]
        if not {"step", "split"} <= set(columns) or len(set(columns)) < len(columns):
            raise self._damaged(1, "it does not name the columns step, split and others, each once")
        for number, line in enumerate(lines[1:], 2):
            if len(line) != len(columns):
                raise self._damaged(number, f"it has {len(line)} cells for {len(columns)} columns")
            if not re.fullmatch(r"[0-9]{1,18}", line[columns.index("step")]):
                raise self._damaged(number, "its step is not a number")
        known = dict.fromkeys(METRICS, "")
        return [known | dict(zip(columns, line, strict=True)) for line in lines[1:]]

    def _damaged(self, number: int, reason: str) -> HeadwiseError:
        return HeadwiseError(
            f"{self.metrics} is damaged in line {number}: {reason}; mend or delete the line "
            "(nothing was changed)"
        )

    def _columns(self) -> list[str]:
        """The columns that metrics.csv names; none where a kill cut its first line short."""
        with self.metrics.open(newline="", encoding="utf-8", errors="replace") as file:
            line = file.readline(_LONGEST_LINE)
        return next(csv.reader([line])) if line.endswith("\n") else []

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Replace metrics.csv."""
        columns = list(rows[0]) if rows else list(METRICS)
        with replacing(self.metrics) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def drop_after(self, step: int) -> None:
        """Forget what was measured after `step`, and what a killed process left; before a resume.

        Raises:
            HeadwiseError: a newer headwise wrote the folder, or metrics.csv is damaged; nothing is changed.
        """
        self.refuse_newer()
        self.refuse_outdated()
        rows = [row for row in self.read_metrics() if int(row["step"]) <= step]
        sweep(self.path)
        if self.metrics.exists():
            self._rewrite(rows)
        tables = [
            part for folder in (self.heads, self.entanglement) for part in folder.glob("step_*.parquet")
        ]
        for part in [*tables, *self.maps.glob("step_*.npz")]:
            number = re.match(r"step_([0-9]+)", part.name)
            if number and int(number[1]) > step:
                part.unlink()
        self.summary.unlink(missing_ok=True)

    def say(self, line: str) -> None:
        """Append a line with the time to log.txt.

        Raises:
            HeadwiseError: the disk is full.
        """
        with _appending(self.log) as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


@contextmanager
def _appending(path: Path) -> Iterator[TextIO]:
    try:
        with writing(path), path.open("a", newline="", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise HeadwiseError(f"cannot write {path}: {error.strerror}") from error


def _read_json(path: Path, schema: Any) -> dict[str, Any]:
    try:
        content: dict[str, Any] = reading.read_json(path, schema, accept=known_format(path))
        return content
    except reading.Missing as error:
        raise HeadwiseError(f"{path.parent} has no {path.name}: its run has not come that far") from error
    except reading.Unreadable as error:
        raise error.so("delete it and run again") from error


def known_format(
    what: object, error: type[HeadwiseError] = HeadwiseError, *, known: int = FORMAT
) -> Callable[[Any], None]:
    """For `accept` of a reader: refuses the values of a file that a newer headwise wrote.

    Args:
        what: names the file in the message.
        error: what is raised.
        known: the newest format of such a file.
    """

    def accept(values: Any) -> None:
        number = values.get("format", 0) if isinstance(values, dict) else 0
        if number not in range(known + 1) or isinstance(number, bool):
            raise error(
                f"{what} has format {number!r} and this headwise reads up to {known}; "
                "upgrade headwise to use it"
            )

    return accept


def state_of(status: dict[str, Any]) -> str:
    """The state that `status` tells of; a `running` that stopped breathing is `interrupted`."""
    state: str = status.get("state", "planned")
    if state != "running":
        return state
    here = status.get("host") == socket.gethostname()
    beats = time.time() - status.get("heartbeat", 0) < STALE_S
    return "running" if beats and not (here and not _alive(status.get("pid"))) else "interrupted"


def _alive(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
