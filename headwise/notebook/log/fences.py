"""Prose and fences of a Markdown log, by CommonMark's rules: a longer closing fence also closes."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass

_OPEN = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_COMMENT = re.compile(r" {0,3}<!--")
_RAW = re.compile(r" {0,3}<(pre|script|style|textarea)(?=[\s>]|$)", re.IGNORECASE)
_MARK = re.compile(r"[ \t]*<!-- /?headwise:")
_COMPARE = re.compile(r"( {0,3}(?:[*+-][ \t]+|\d{1,9}[.)][ \t]+)?[*_]{0,2}Compare)(?=[*_]{0,2}:)")
_HIDDEN = re.compile(r"((?:`{3,}|~{3,})[ \t]*)(?=headwise(?![\w-]))")


@dataclass(frozen=True)
class Prose:
    """Lines outside fences, unchanged except those that a notebook would interpret, which are escaped."""

    lines: tuple[str, ...]
    changed: tuple[int, ...]


@dataclass(frozen=True)
class Fence:
    """A fence of the log.

    Attributes:
        line: of its opening, counted from 1.
        info: its info string.
        body: its lines.
        closed: whether the log closes it; the last fence may be open.
        mark: its back-ticks or tildes.
    """

    line: int
    info: str
    body: tuple[str, ...]
    closed: bool
    mark: str


def split(text: str) -> list[Prose | Fence]:
    """The parts of a log, top to bottom."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    ends = _Ends(lines)
    found: list[Prose | Fence] = []
    prose: list[str] = []
    changed: list[int] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        opening = _OPEN.fullmatch(line)
        if opening and not (opening[1][0] == "`" and "`" in opening[2]):
            if prose:
                found.append(Prose(tuple(prose), tuple(changed)))
                prose, changed = [], []
            close = re.compile(rf" {{0,3}}{opening[1][0]}{{{len(opening[1])},}}[ \t]*")
            last = next((n for n in range(at + 1, len(lines)) if close.fullmatch(lines[n])), len(lines))
            body = tuple(lines[at + 1 : last])
            found.append(Fence(at + 1, opening[2].strip(), body, last < len(lines), opening[1]))
            at = last + 1
            continue
        hidden = ends.of(at)
        kept = [_harmless(line)] if hidden is None else lines[at : hidden + 1]
        changed += [at + 1] if kept[0] != line else []
        prose += kept
        at += len(kept)
    return [*found, Prose(tuple(prose), tuple(changed))] if prose else found


class _Ends:
    """Finds the ends of HTML comments and raw HTML; each kind of end is searched for once per log."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self._next: dict[str, list[int]] = {}

    def of(self, at: int) -> int | None:
        """The last line of a comment or raw HTML that begins at this line; None if none begins or it never
        ends.

        The comments of a notebook's own format do not count, because they have no meaning in a log.
        """
        line = self._lines[at]
        if _COMMENT.match(line) and not _MARK.match(line):
            start = line.index("<!--") + 4
            return at if "-->" in line[start:] else self._after(at, "-->")
        if raw := _RAW.match(line):
            end = f"</{raw[1].lower()}>"
            return at if end in line.lower() else self._after(at, end)
        return None

    def _after(self, at: int, what: str) -> int | None:
        if what not in self._next:
            self._next[what] = [n for n, line in enumerate(self._lines) if what in line.lower()]
        places = self._next[what]
        found = bisect.bisect_right(places, at)
        return places[found] if found < len(places) else None


def _harmless(line: str) -> str:
    """A line of prose, escaped so that a notebook does not interpret it; it renders the same."""
    if _MARK.match(line) or _COMMENT.match(line) or _RAW.match(line):
        return line.replace("<", "&lt;", 1)
    line = _COMPARE.sub(r"\1&#8203;", line)
    return _HIDDEN.sub(r"\1text ", line)
