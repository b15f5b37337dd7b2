"""The run folder: everything a run leaves behind, found and read without a server or a registry.

config.yaml env.json metrics.csv heads/ maps/ checkpoints/step_<n>/ status.json summary.json log.txt
"""

from __future__ import annotations

import csv
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import refuse_full_disk, replacing, sweep, write_json, write_text
from headwise.reading.csvfile import LIMIT as CSV_LIMIT
from headwise.runs.schemas import Environment, Status, Summary

STATES = (
    "planned", "running", "interrupted", "finished", "failed", "timed_out", "diverged", "skipped",
)  # fmt: skip
"""The states of a run, everywhere the same words."""

HEARTBEAT_S = 5.0
STALE_S = 60.0

METRICS = (
    "step", "split", "loss", "tokens_per_sec", "step_time_ms", "vram_mb", "grad_norm", "lr", "flops",
    "bits_per_byte", "perplexity", "accuracy", "smooth_loss", "tokens", "flops_per_sec", "data_wait",
    "penalty",
)  # fmt: skip
"""Columns of metrics.csv; a value that does not apply is empty."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and whole-file writes of one run."""

    path: Path

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
        return self.config.exists()

    def refuse_taken(self) -> None:
        """Refuse to start a run here when something else is.

        Raises:
            HeadwiseError: the folder holds another run or other files.
        """
        if self.holds_run():
            raise HeadwiseError(
                f"{self.path} holds another run; pass --resume to continue it, or another --out"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise HeadwiseError(f"{self.path} exists and is no run folder; pass another --out")

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

    def read_status(self) -> dict[str, Any]:
        """status.json as it stands, or `{"state": "planned"}`.

        Raises:
            HeadwiseError: it is damaged.
        """
        try:
            return {"state": "planned"} | reading.read_json(self.path / "status.json", Status)
        except reading.Missing:
            return {"state": "planned"}
        except reading.Unreadable as error:
            raise error.so("delete it, and the run counts as planned") from error

    def write_status(self, state: str, **values: Any) -> None:
        """Replace status.json, keeping earlier values that are not given again."""
        if state not in STATES:
            raise ValueError(f"{state!r} is not one of {STATES}")
        status = self.read_status() | {
            "state": state, "pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time(),
        }  # fmt: skip
        write_json(self.path / "status.json", status | values)

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
        write_json(self.summary, summary)

    def append_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows to metrics.csv in one write.

        Raises:
            HeadwiseError: the disk is full.
        """
        fresh = not self.metrics.exists()
        with _appending(self.metrics) as file:
            writer = csv.DictWriter(file, METRICS)
            if fresh:
                writer.writeheader()
            for row in rows:
                writer.writerow({k: "" if v is None else v for k, v in row.items()})

    def read_metrics(self) -> list[dict[str, str]]:
        """The whole rows of metrics.csv; a last line that a kill cut short is left out."""
        try:
            text = reading.read_text(self.metrics, limit=CSV_LIMIT)
        except reading.Missing:
            return []
        whole = text[: text.rfind("\n") + 1]
        try:
            return [row for row in csv.DictReader(whole.splitlines()) if _whole(row)]
        except csv.Error as error:
            raise reading.Unreadable(self.metrics, f"it is no CSV: {error}") from error

    def drop_after(self, step: int) -> None:
        """Forget what was measured after `step`, and what a killed process left; before a resume."""
        sweep(self.path)
        if self.metrics.exists():
            rows = [row for row in self.read_metrics() if int(row["step"]) <= step]
            with replacing(self.metrics) as draft, draft.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, METRICS)
                writer.writeheader()
                writer.writerows(rows)
        for part in [*self.heads.glob("step_*.parquet"), *self.maps.glob("step_*.npz")]:
            number = part.stem.removeprefix("step_").split("-")[0]
            if _is_step(number) and int(number) > step:
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
        with path.open("a", newline="", encoding="utf-8") as file:
            yield file
    except OSError as error:
        refuse_full_disk(path, error)
        raise HeadwiseError(f"cannot write {path}: {error.strerror}") from error


def _read_json(path: Path, schema: Any) -> dict[str, Any]:
    try:
        return reading.read_json(path, schema)
    except reading.Missing as error:
        raise HeadwiseError(f"{path.parent} has no {path.name}: its run has not come that far") from error
    except reading.Unreadable as error:
        raise error.so("delete it and run again") from error


def _whole(row: dict[str, Any]) -> bool:
    return all(isinstance(row.get(column), str) for column in METRICS) and _is_step(row["step"])


def _is_step(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def state_of(status: dict[str, Any]) -> str:
    """The state that `status` tells of; a `running` that stopped breathing is `interrupted`."""
    state = status.get("state", "planned")
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
