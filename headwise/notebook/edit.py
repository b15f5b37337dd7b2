"""Rewrites the state of fences and the marked blocks of a notebook in its latest text, and nothing else."""

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
"""Rewriting takes at most 1/SHARE of the time, so that a long notebook is not rewritten at every change."""


@dataclass
class Board:
    """Pending changes to a notebook; `flush` writes them at a limited rate.

    Attributes:
        path: the notebook.
        commands: the commands of each block when it was planned.
        replace_edited: also replace results that were edited by hand.
        say: called once for each change that is not written, with the reason.
        written: the content that was written last.
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
        """Set the state of a block."""
        self._states[name] = (state, identity)

    def mark(self, name: str, text: str) -> None:
        """Set the text of the marked block of a block or a comparison."""
        self._marks[name] = text

    def flush(self, *, now: bool = False) -> None:
        """Write the pending changes; without `now`, only if the last write is long enough ago."""
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
        """The index of the line at which the marked block of `name` is inserted; None if it has no place."""
        for compare in document.compares:
            if compare.mark == name:
                return compare.at + 1
        fence = blocks.get(name)
        if fence is None:
            if "/" not in name:
                self._tell(f"block {name!r} is no longer in {self.path.name}; its result is not written")
            return None
        words = [(one.verb, one.words) for one in fence.commands]
        if words != [(one.verb, one.words) for one in self.commands[name]]:
            self._tell(f"block {name!r} was changed while it ran; its result is not written; run it again")
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
                f"line {mark.first + 1}: the result of {name!r} was edited by hand and is not replaced; "
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
    """Replace a file by `change` of its latest content; returns the reason if that fails, else None.

    If an editor saves the file in the meantime, its text is changed instead: the file is compared with the
    text that was read just before it is replaced, and the replaced file is read once more afterwards.
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
        return f"{path.name} was deleted or renamed; states and results are not written"
    except (HeadwiseError, UnicodeDecodeError) as error:
        return f"{path.name} could not be rewritten: {error}"


class _Moved(Exception):
    """The file changed after it was read."""


def _replaced(target: Path, there: bytes, after: bytes) -> tuple[bytes | None, bytes]:
    """Replace the content `there` by `after`.

    Returns:
        The content that another program wrote meanwhile, or None, and the present content of the file.
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
    """Sync the draft first, so that no slow operation comes between the last comparison and the rename."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
