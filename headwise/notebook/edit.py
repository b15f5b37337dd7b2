"""Rewriting a notebook: a fence's state and the marked blocks, on the latest text, and nothing else."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import replacing
from headwise.notebook.commands import Command
from headwise.notebook.document import LIMIT, Document, Fence, checksum, parse
from headwise.notebook.naming import named

PAUSE_S = 1.0
SHARE = 20
"""Rewriting takes at most one part in so many of the time: a long one is not rewritten at every change."""


@dataclass
class Board:
    """What is to be written into a notebook. `flush` writes it, not more often than is useful.

    Attributes:
        path: the notebook.
        commands: of each block, as they were when it was planned.
        replace_edited: replace results that were edited by hand too.
        say: told once of everything that is not written, with the reason.
    """

    path: Path
    commands: dict[str, tuple[Command, ...]]
    say: Callable[[str], None]
    replace_edited: bool = False
    _states: dict[str, tuple[str, str]] = field(default_factory=dict)
    _marks: dict[str, str] = field(default_factory=dict)
    _next: float = 0.0
    _said: set[str] = field(default_factory=set)

    def state(self, name: str, state: str, identity: str) -> None:
        """The state of a block."""
        self._states[name] = (state, identity)

    def mark(self, name: str, text: str) -> None:
        """The text of a block's or a comparison's marked block."""
        self._marks[name] = text

    def flush(self, *, now: bool = False) -> None:
        """Write what is not written yet; at once, or when the last time lies far enough back."""
        began = time.monotonic()
        if not (self._states or self._marks) or (not now and began < self._next):
            return
        problem = _rewrite(self.path, self._changed)
        if problem is None:
            self._states.clear()
            self._marks.clear()
        else:
            self._tell(problem)
        ended = time.monotonic()
        self._next = ended + max(PAUSE_S, SHARE * (ended - began))

    def _tell(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def _changed(self, content: bytes) -> bytes:
        text = content.decode("utf-8")
        document = parse(text)
        blocks = named(document)
        edits: list[tuple[int, int, str]] = []  # index of a line, lines that it replaces, text
        for name in dict.fromkeys([*self._states, *self._marks]):
            at = self._place(document, blocks, name)
            if at is None:
                continue
            if name in self._states:
                fence = blocks[name]
                edits.append((fence.first, 1, _with_state(document, fence, *self._states[name])))
            if name in self._marks and (edit := self._marked(document, name, at)):
                edits.append(edit)
        lines = list(document.lines)
        for first, count, new in sorted(edits, reverse=True):
            if count == 0 and first and lines[first - 1][-1:] not in ("\n", "\r"):
                lines[first - 1] += document.newline
            lines[first : first + count] = [new]
        return "".join(lines).encode()

    def _place(self, document: Document, blocks: dict[str, Fence], name: str) -> int | None:
        """The index of the line under which the marked block of `name` goes; None where it has no place."""
        for compare in document.compares:
            if compare.mark == name:
                return compare.at + 1
        fence = blocks.get(name)
        if fence is None:
            if "/" not in name:
                self._tell(f"block {name!r} is not in {self.path.name} any more: nothing was written of it")
            return None
        words = [(one.verb, one.words) for one in fence.commands]
        if words != [(one.verb, one.words) for one in self.commands[name]]:
            self._tell(f"block {name!r} was changed while it ran: nothing was written of it; run it again")
            return None
        return fence.last + 1

    def _marked(self, document: Document, name: str, at: int) -> tuple[int, int, str] | None:
        end = document.newline
        inside = f"\n{self._marks[name].strip()}\n\n"
        text = f"<!-- headwise:result {name} {checksum(inside)} -->\n{inside}<!-- /headwise:result -->\n"
        text = text.replace("\n", end)
        mark = document.mark_of(name)
        if mark is None:
            return at, 0, text
        if checksum(mark.text) == checksum(inside):
            return None
        if mark.edited and not self.replace_edited:
            self._tell(
                f"line {mark.first + 1}: the result of {name!r} was edited by hand and stays as it is; "
                "--replace-edited replaces it"
            )
            return None
        last = document.lines[mark.last]
        if last[-1] not in "\r\n":
            text = text[: -len(end)]
        return mark.first, mark.last - mark.first + 1, text


def _with_state(document: Document, fence: Fence, state: str, identity: str) -> str:
    start, end = fence.word
    word = f"headwise:{state}" + (f"/{identity}" if identity and state != "planned" else "")
    line = document.lines[fence.first]
    return f"{line[:start]}{word}{line[end:]}"


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> str | None:
    """Replace a file by `change` of its latest content; returns why that cannot be, or None.

    What an editor writes in the meantime is changed in its turn: the file is compared with what was read just
    before it is replaced, and what was replaced is read once more after that.
    """
    target = Path(os.path.realpath(path))
    try:
        content = there = reading.read_bytes(target, limit=LIMIT)
        while True:
            after = change(content)
            if after == there:
                return None
            left, there = _replaced(target, there, after)
            if left is None:
                return None
            content = left
    except reading.Missing:
        return f"{path.name} was deleted or renamed: states and results are not written"
    except (HeadwiseError, UnicodeDecodeError) as error:
        return f"{path.name} cannot be rewritten just now: {error}"


class _Moved(Exception):
    """The file is not what was read."""


def _replaced(target: Path, there: bytes, after: bytes) -> tuple[bytes | None, bytes]:
    """Put `after` in the place of `there`.

    Returns:
        what somebody else wrote meanwhile, None where nobody did, and what the file holds now.
    """
    with reading.opened(target) as file:
        try:
            with replacing(target) as draft:
                draft.write_bytes(after)
                shutil.copymode(target, draft)
                _written_out(draft)
                if reading.read_bytes(target, limit=LIMIT) != there:
                    raise _Moved
        except _Moved:
            now = reading.read_bytes(target, limit=LIMIT)
            return now, now
        left = file.read()
        return (None if left == there else left), after


def _written_out(draft: Path) -> None:
    """Sync before the last look at the file, so that nothing slow comes between it and the rename."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
