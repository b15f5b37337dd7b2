"""The initial weights of the log's runs: files, earlier runs of the log, models made for them."""

from __future__ import annotations

import re
from typing import Any

from headwise.errors import HeadwiseError
from headwise.notebook.log.translate import KIND, Run, one_head_less

_CACHED = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/[^/]+/(.+)")
_SAVED = re.compile(r"(?:\./)?([^/]+)/model_(\d{1,9})\.pt")


def named(source: str) -> tuple[str, str]:
    """A source in this project's notation, and a note; a file in the hub's cache becomes a file of the hub.

    Raises:
        HeadwiseError: it cannot be an argument of a command.
    """
    if not source.isprintable() or not source.strip() or source.startswith("-"):
        raise HeadwiseError(f"--resume_checkpoint is {source[:60]!r}, which is not the name of a file")
    if found := _CACHED.fullmatch(source):
        return (
            f"hf://{found[1]}/{found[2]}/{found[3]}",
            "the log used a snapshot in the hub's cache; here the latest version is used",
        )
    return source, ""


def of_the_log(source: str) -> tuple[str, int] | None:
    """The run and the step of `RUN/model_07500.pt`; None for a source of another form."""
    found = _SAVED.fullmatch(source)
    return (found[1], int(found[2])) if found else None


def kind_of(source: str) -> str:
    """The kind of attention in a file of weights, from its name, which contains it in the log."""
    name = source.replace("unselective", "")
    return "selective" if "selective" in name else "flash"


def fresh(run: Run) -> dict[str, Any]:
    """The model before its first head is added, trained for one step, the shortest possible run."""
    return one_head_less(run.values) | {"training.max_steps": 1, "training.eval_every": 0}


def stand_in(run: Run, source: str) -> dict[str, Any]:
    """A small model that replaces unavailable weights, with the same number of heads."""
    added = bool(run.start and run.start.place)
    values = one_head_less(run.values) if added else dict(run.values)
    kept = {key: value for key, value in values.items() if not key.startswith("model.attention.")}
    return kept | {KIND: kind_of(source), "training.keep_optimizer": False}
