"""The weights that runs of the log start from: files, earlier runs of the log, models made for them."""

from __future__ import annotations

import re
from typing import Any

from headwise.errors import HeadwiseError
from headwise.notebook.log.translate import KIND, Run, one_head_less

_CACHED = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/[^/]+/(.+)")
_SAVED = re.compile(r"(?:\./)?([^/]+)/model_(\d{1,9})\.pt")


def named(source: str) -> tuple[str, str]:
    """A source as this project names it, and a note; a file of the hub's cache is a file of the hub.

    Raises:
        HeadwiseError: it cannot stand in a command.
    """
    if not source.isprintable() or not source.strip() or source.startswith("-"):
        raise HeadwiseError(f"--resume_checkpoint is {source[:60]!r}, which names no file")
    if found := _CACHED.fullmatch(source):
        return (
            f"hf://{found[1]}/{found[2]}/{found[3]}",
            "the file of a snapshot in the hub's cache; here the latest",
        )
    return source, ""


def of_the_log(source: str) -> tuple[str, int] | None:
    """The run and the step of `RUN/model_07500.pt`; None where a source is not of that form."""
    found = _SAVED.fullmatch(source)
    return (found[1], int(found[2])) if found else None


def kind_of(source: str) -> str:
    """The attention that a file was trained with, by its name: the files of the log say it."""
    name = source.replace("unselective", "")
    return "selective" if "selective" in name else "flash"


def fresh(run: Run) -> dict[str, Any]:
    """A model as it is before its first head is added: trained for one step, for a run has at least one."""
    return one_head_less(run.values) | {"training.max_steps": 1, "training.eval_every": 0}


def stand_in(run: Run, source: str) -> dict[str, Any]:
    """A small model in the place of weights that are not here, with the heads that they have."""
    added = bool(run.start and run.start.place)
    values = one_head_less(run.values) if added else dict(run.values)
    kept = {key: value for key, value in values.items() if not key.startswith("model.attention.")}
    return kept | {KIND: kind_of(source), "training.keep_optimizer": False}
