"""A notebook that is run once, or again whenever its user changes it."""

from __future__ import annotations

import time
from pathlib import Path

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.notebook.document import LIMIT, parse
from headwise.notebook.planning import Options
from headwise.notebook.running import How, locked, pass_over

PAUSE_S = 1.0


def run_notebook(path: Path, options: Options, how: How, *, watch: bool) -> int:
    """Run a notebook, once or whenever its user changes it; returns the exit code."""
    with locked(path):
        while True:
            before = _own(path)
            try:
                code = pass_over(path, options, how)
            except HeadwiseError as error:
                if not watch:
                    raise
                how.say(f"headwise: {error}")
                code = 2
            if not watch or code == 130:
                return code
            how.say(f"watching {path.name}; Ctrl-C ends it")
            try:
                _wait(path, before)
            except KeyboardInterrupt:
                return code


def _wait(path: Path, before: str | None) -> None:
    """Wait until a notebook is not, for its user, what it was: also for what was written while it ran.

    Raises:
        HeadwiseError: it was deleted.
    """
    seen, missing = None, 0
    while True:
        try:
            about = path.stat()
        except FileNotFoundError:  # an editor may be replacing it
            missing += 1
            if missing > 2:
                raise HeadwiseError(f"{path.name} was deleted or renamed; nothing is left to watch") from None
        else:
            missing, last = 0, seen
            seen = (about.st_ino, about.st_size, about.st_mtime_ns)
            if seen != last and _own(path) not in (before, None):
                return
        time.sleep(PAUSE_S)


def _own(path: Path) -> str | None:
    """What the user wrote of a notebook; all of it where it cannot be read, None where it is not there."""
    try:
        text = reading.read_bytes(path, limit=LIMIT).decode("utf-8", "replace")
    except reading.Unreadable:
        return None
    try:
        return parse(text).own
    except HeadwiseError:
        return text
