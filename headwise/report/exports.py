"""Tables as files: one row per run in `sweep_results.csv`, one per evaluation in `all_results.parquet`.

The names of the files and of their first columns are those of the attention variant study; `backend` is the
kind of attention and `tt_rank` its option `rank`, if it has one.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.files import replacing, write_text
from headwise.runs.read import Run, Unreadable

if TYPE_CHECKING:
    import polars

SWEEP = (
    "run_id", "backend", "tt_rank", "seq_len", "batch_size", "steps", "d_model", "n_heads", "n_layers",
    "tokens_per_sec", "step_time_ms", "peak_vram_mb", "train_loss_last", "val_loss", "timestamp", "git_sha",
    "variant", "seed", "status", "passes_per_step", "wanted_batch_size", "peak_rss_mb", "peak_mb_tried",
    "memory_limit_mb", "memory_measured_by", "params_total", "tokens", "flops", "notes",
)  # fmt: skip
"""Columns of sweep_results.csv. `batch_size` is the number of sequences in a pass, and a step has
`passes_per_step` passes; `wanted_batch_size` and `peak_mb_tried` are set for runs that did not fit."""

ALL = (
    "run_id", "backend", "tt_rank", "seq_len", "batch", "steps", "tokens_per_sec", "peak_vram_mb",
    "step_time_ms", "train_loss", "val_loss", "perplexity", "notes", "variant", "seed", "status", "step",
    "split", "last", "loss", "accuracy", "bits_per_byte", "tokens", "flops", "peak_rss_mb", "data_checksum",
)  # fmt: skip
"""Columns of all_results.parquet: of the run up to `status`, then of one evaluation."""
TEXT = ("run_id", "backend", "notes", "variant", "status", "split", "data_checksum")


INTEGERS = ("tt_rank", "seq_len", "batch", "steps", "seed", "step")


def sweep_rows(runs: list[Run], root: Path) -> list[dict[str, Any]]:
    """One row per run, in the order of the runs; a run that has not started has its place and its status."""
    found = [_values(run, root) for run in runs]
    return [{name: values.get(name) for name in SWEEP} for values in found]


def write_sweep(
    runs: list[Run], root: Path, out: Path, known: dict[Path, tuple[Any, dict[str, Any]]] | None = None
) -> Path:
    """Write `out/sweep_results.csv`, whole or not at all.

    Args:
        known: rows of an earlier call, which are taken where a run's status and summary are as they were; it
            is brought up to date.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, SWEEP, lineterminator="\n")
    writer.writeheader()
    for row in sweep_rows(runs, root) if known is None else _changed_rows(runs, root, known):
        writer.writerow({key: "" if value is None else value for key, value in row.items()})
    path = out / "sweep_results.csv"
    write_text(path, text.getvalue())
    return path


def _changed_rows(
    runs: list[Run], root: Path, known: dict[Path, tuple[Any, dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for run in runs:
        seen = [_stamp(run.path / name) for name in ("status.json", "summary.json")]
        if run.path not in known or known[run.path][0] != seen:
            known[run.path] = (seen, sweep_rows([run], root)[0])
        yield known[run.path][1]


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes with a file that is replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def write_all(runs: list[Run], root: Path, out: Path) -> Path:
    """Write `out/all_results.parquet`, whole or not at all."""
    path = out / "all_results.parquet"
    frame = all_results(runs, root)
    with replacing(path) as draft:
        frame.write_parquet(draft)
    return path


def all_results(runs: list[Run], root: Path) -> polars.DataFrame:
    """Every evaluation of every run, with the cost of the run; a run without evaluations has one row."""
    import polars as pl

    rows = []
    for run in runs:
        about = _values(run, root)
        about |= {
            "batch": about["batch_size"], "train_loss": about["train_loss_last"],
            "data_checksum": run.get("data_checksum"),
        }  # fmt: skip
        found = list(_evaluations(run)) or [{}]
        rows += [about | evaluation for evaluation in found]
    types: dict[str, Any] = dict.fromkeys(ALL, pl.Float64)
    types |= dict.fromkeys(TEXT, pl.String) | dict.fromkeys(INTEGERS, pl.Int64) | {"last": pl.Boolean}
    return pl.DataFrame([{name: row.get(name) for name in ALL} for row in rows], schema=types)


def _evaluations(run: Run) -> Any:
    """Rows of metrics.csv that are evaluations, each split's last one marked."""
    if run.problem:
        return
    frame = run.metrics
    frame = frame.filter(frame["split"] != "train")
    lasts = {row["split"]: row["step"] for row in frame.iter_rows(named=True)}
    for row in frame.iter_rows(named=True):
        yield {
            "step": row["step"], "split": row["split"], "last": lasts[row["split"]] == row["step"],
            **{key: row.get(key) for key in ("loss", "accuracy", "bits_per_byte", "perplexity", "tokens",
                                             "flops")},
        }  # fmt: skip


def option(run: Run, *keys: str) -> Any:
    """A value of the run's configuration; None where it has none."""
    found: Any
    try:
        found = run.config
    except Unreadable:
        return None
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def rank_of(run: Run) -> int | None:
    """The option `rank` of the kind of attention that ran."""
    found = option(run, "model", "attention", str(run.get("kind")), "rank")
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def fit_of(run: Run) -> dict[str, Any]:
    """The attempts of a run that did not fit into memory; empty for other runs."""
    return {} if run.problem else run.status.get("fit") or {}


def _values(run: Run, root: Path) -> dict[str, Any]:
    fit, state = fit_of(run), run.state
    ended = None if run.problem else run.status.get("finished") or run.status.get("heartbeat")
    size, per_step = option(run, "data", "batch_size"), run.get("batch_size")
    place = run.path.relative_to(root) if run.path.is_relative_to(root) else run.path
    peaks = [one["peak_mb"] for one in fit.get("tried", []) if one.get("peak_mb") is not None]
    notes = [] if state == "finished" else [run.reason]
    if fit and state == "finished":
        notes = [f"batch of {fit.get('wanted')} did not fit; a pass has {size}"]
    return {
        "run_id": place.as_posix(), "backend": run.get("kind"), "tt_rank": rank_of(run),
        "seq_len": run.get("seq_len") or option(run, "data", "seq_len"), "batch_size": size,
        "steps": run.get("step"),
        **{key: run.get(key) or option(run, "model", key) for key in ("d_model", "n_heads", "n_layers")},
        **{key: run.get(key) for key in ("tokens_per_sec", "step_time_ms", "peak_vram_mb", "peak_rss_mb",
                                         "val_loss", "params_total", "tokens", "flops", "seed", "variant")},
        "perplexity": run.get("val_perplexity"), "train_loss_last": run.get("train_loss"),
        "timestamp": ended and time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ended)),
        "git_sha": run.get("git_commit"), "status": state,
        "passes_per_step": per_step // size if per_step and size else None,
        "wanted_batch_size": fit.get("wanted"), "peak_mb_tried": max(peaks, default=None),
        "memory_limit_mb": fit.get("limit_mb"), "memory_measured_by": fit.get("measured_by"),
        "notes": "; ".join(filter(None, notes)) or None,
    }  # fmt: skip
