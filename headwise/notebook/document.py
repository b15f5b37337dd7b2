"""The parts of a notebook's text: fences, hypotheses, `Compare:` lines, marked blocks, headings.

Fences are CommonMark's, as far as a notebook needs them: any length of back-ticks or tildes, any line
endings, never inside an HTML comment or a longer fence. A fence that CommonMark would not run at the margin,
such as one in a list, is refused.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from headwise import reading
from headwise.analysis.conclusion import smallest_difference
from headwise.errors import HeadwiseError, one_of
from headwise.names import folder_name
from headwise.notebook.commands import Command, read_commands
from headwise.runs.folder import STATES

LIMIT = 64 << 20
LONGEST_CLAIM = 1000
DIRECTIONS = ("lower", "higher", "equal")
MARK = re.compile(r" {0,3}<!-- headwise:result (.+?)(?: ([0-9a-f]{8,64}))? -->[ \t]*")
MARK_END = re.compile(r" {0,3}<!-- /headwise:result -->[ \t]*")

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")
_FENCE = re.compile(r"( {0,3})(`{3,}|~{3,})(.*)", re.DOTALL)
_HIDDEN = re.compile(r"[ \t>]*(?:(?:[*+-]|\d{1,9}[.)])[ \t>]+){0,4}(?:`{3,}|~{3,})[ \t]*headwise(?![\w-])")
_INFO = re.compile(r"headwise(?::([^\s/]*)(?:/(\S*))?)?(?:[ \t]+(.*\S))?[ \t]*", re.DOTALL)
_RAW = re.compile(r" {0,3}<(pre|script|style|textarea)(?:[\s>]|$)", re.IGNORECASE)
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*")
_UNDERLINE = re.compile(r" {0,3}(?:=+|-{3,})[ \t]*")
_BULLET = r" {0,3}(?:[*+-][ \t]+|\d{1,9}[.)][ \t]+)?"
_HYPOTHESIS = re.compile(_BULLET + r"[*_]{0,2}Hypothesis[*_]{0,2}:[*_]{0,2}[ \t]*(.*)", re.DOTALL)
_COMPARE = re.compile(_BULLET + r"[*_]{0,2}Compare[*_]{0,2}:[*_]{0,2}[ \t]*(.*?)[ \t]*", re.DOTALL)
_CLAIM = re.compile(
    r"(.+?) vs\.? (.+?), *([a-z][a-z0-9_]*), *([A-Za-z]+)(?:, *at least (\S+?))?\.?", re.DOTALL
)


@dataclass(frozen=True)
class Fence:
    """A block of commands.

    Attributes:
        first, last: indices of its opening and closing lines.
        word: start and end of the info string's first word within the opening line.
        state, id: from the info string; `planned` and empty if it has none.
        given: the name in the info string; None if it has none.
        commands: at least one.
    """

    first: int
    last: int
    word: tuple[int, int]
    state: str
    id: str
    given: str | None
    commands: tuple[Command, ...]

    @property
    def line(self) -> int:
        """Number of the opening line, counted from 1."""
        return self.first + 1


@dataclass(frozen=True)
class Compare:
    """A `Compare:` line.

    Attributes:
        at: index of its line.
        smallest: the smallest difference that matters, as written; None if it is not given.
        section: the heading above the line, with the number of its line.
    """

    at: int
    a: str
    b: str
    measure: str
    direction: str
    smallest: str | None
    section: str

    @property
    def text(self) -> str:
        """The claim with its spaces normalized."""
        least = f", at least {self.smallest}" if self.smallest else ""
        return f"{self.a} vs {self.b}, {self.measure}, {self.direction}{least}"

    @property
    def mark(self) -> str:
        """The name of its marked block; no block of commands can have such a name."""
        return f"compare/{checksum(self.text)[:8]}"


@dataclass(frozen=True)
class Mark:
    """A marked block: `name`, `sha` as written, indices of its first and last lines, the text between."""

    name: str
    sha: str
    first: int
    last: int
    text: str

    @property
    def edited(self) -> bool:
        """Whether the text differs from the text that headwise wrote."""
        return not checksum(self.text).startswith(self.sha or "edited")


@dataclass
class Document:
    """A parsed notebook. `lines` keep their endings; `hypotheses` and `hidden` are ranges of line indices."""

    lines: list[str]
    fences: list[Fence] = field(default_factory=list)
    compares: list[Compare] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    hypotheses: list[tuple[int, int]] = field(default_factory=list)
    hidden: list[tuple[int, int]] = field(default_factory=list)
    title: str = ""

    @property
    def newline(self) -> str:
        """The ending of its first line."""
        return next((line[len(line.rstrip("\r\n")) :] for line in self.lines if line[-1] in "\r\n"), "\n")

    @property
    def own(self) -> str:
        """What its user wrote: all but states and marked blocks."""
        gone = {n for mark in self.marks for n in range(mark.first, mark.last + 1)}
        words = {fence.first: fence.word for fence in self.fences}
        kept = []
        for n, line in enumerate(self.lines):
            if n in words:
                start, end = words[n]
                line = line[:start] + line[end:]
            kept += [] if n in gone else [line]
        return "".join(kept).rstrip("\r\n")

    def mark_of(self, name: str) -> Mark | None:
        """The marked block with this name, or None."""
        return next((mark for mark in self.marks if mark.name == name), None)

    def hypothesis_of(self, fence: Fence) -> str:
        """The `Hypothesis:` paragraphs between the previous fence and this one, without that word."""
        before = max((other.last for other in self.fences if other.last < fence.first), default=-1)
        found = []
        for first, last in self.hypotheses:
            if before < first < fence.first:
                text = "".join(self.lines[first : last + 1])
                match = _HYPOTHESIS.fullmatch(text)
                found.append(match[1].strip() if match else text)
        return "\n\n".join(found)


def checksum(text: str) -> str:
    """The first 16 digits of the SHA-256 of a text. Line endings do not count: version control changes
    them."""
    return hashlib.sha256(text.replace("\r\n", "\n").replace("\r", "\n").encode()).hexdigest()[:16]


def read(path: Path) -> Document:
    """The notebook in a file.

    Raises:
        HeadwiseError: the file is missing or not UTF-8, or `parse` refuses it; with the file's name.
    """
    try:
        return parse(reading.read_text(path, limit=LIMIT))
    except reading.Unreadable as error:
        raise HeadwiseError(f"notebook {error}") from None
    except HeadwiseError as error:
        raise HeadwiseError(f"{path.name}, {error}") from None


def parse(text: str) -> Document:
    """Find the parts of a text.

    Raises:
        HeadwiseError: a fence, comment or marked block that is not closed, a fence that is not a block, a
            command that a notebook does not run, or a malformed `Compare:` line; with the number of the line.
    """
    found = Document(_LINE.findall(text))
    section, at = "", 0
    while at < len(found.lines):
        line = _bare(found, at)
        if mark := MARK.fullmatch(line):
            at = _read_mark(found, at, mark)
        elif re.match(r" {0,3}<!--", line):
            last = _closing(found, at, re.compile("-->"), "a comment")
            found.hidden.append((at, last))
            at = last
        elif raw := _RAW.match(line):
            at = _closing(found, at, re.compile(rf"</{raw[1]}>", re.IGNORECASE), f"<{raw[1]}>")
        elif (fence := _FENCE.fullmatch(line)) and not (fence[2][0] == "`" and "`" in fence[3]):
            at = _read_fence(found, at, fence)
        elif _HIDDEN.match(line):
            raise HeadwiseError(
                f"line {at + 1}: a headwise fence in a list, in a quotation or indented by four columns is "
                "not run; move it to the left margin, or, if it is an example, put it inside a longer fence"
            )
        elif heading := _HEADING.fullmatch(line):
            section = f"{heading[1] or ''} (line {at + 1})"
            found.title = found.title or (heading[1] or "")
        elif _UNDERLINE.fullmatch(line) and at and _bare(found, at - 1).strip():
            section = f"{_bare(found, at - 1).strip()} (line {at})"
            found.title = found.title or _bare(found, at - 1).strip()
        elif _HYPOTHESIS.fullmatch(line):
            last = _paragraph_end(found, at)
            found.hypotheses.append((at, last))
            at = last
        elif compare := _COMPARE.fullmatch(line):
            found.compares.append(claim(at, compare[1], section))
        at += 1
    _refuse_double(found)
    return found


def _bare(found: Document, at: int) -> str:
    line = found.lines[at].rstrip("\r\n")
    return line.removeprefix("\ufeff") if at == 0 else line


def _closing(found: Document, at: int, end: re.Pattern[str], what: str) -> int:
    for last in range(at, len(found.lines)):
        start = 4 if last == at and what == "a comment" else 0
        if end.search(_bare(found, last).lstrip(" "), start):
            return last
    raise HeadwiseError(f"line {at + 1}: {what} begins here and is not closed")


def _read_mark(found: Document, at: int, mark: re.Match[str]) -> int:
    for last in range(at + 1, len(found.lines)):
        if MARK_END.fullmatch(_bare(found, last)):
            text = "".join(found.lines[at + 1 : last])
            found.marks.append(Mark(mark[1], mark[2] or "", at, last, text))
            return last
        if MARK.fullmatch(_bare(found, last)):
            break
    raise HeadwiseError(
        f"line {at + 1}: the result of {mark[1]!r} begins here and is not closed; write "
        "<!-- /headwise:result --> below it, or delete this line"
    )


def _read_fence(found: Document, at: int, fence: re.Match[str]) -> int:
    close = re.compile(rf" {{0,3}}{fence[2][0]}{{{len(fence[2])},}}[ \t]*")
    last = next((n for n in range(at + 1, len(found.lines)) if close.fullmatch(_bare(found, n))), None)
    info = fence[3].strip(" \t")
    if last is None:
        raise HeadwiseError(f"line {at + 1}: a fence begins here and is not closed")
    if not re.match(r"headwise(?![\w-])", info):
        return last
    match = _INFO.fullmatch(info)
    if match is None:
        raise HeadwiseError(f"line {at + 1}: {info!r} is not `headwise[:STATE[/ID]] [NAME]`")
    word = info.split(maxsplit=1)[0]
    start = found.lines[at].index(word)
    try:
        state = one_of("state", match[1], STATES) if match[1] is not None else "planned"
        given = None if match[3] is None else block_name(match[3])
    except HeadwiseError as error:
        raise HeadwiseError(f"line {at + 1}: {error}") from None
    commands = read_commands("".join(found.lines[at + 1 : last]), at + 2)
    if not commands:
        raise HeadwiseError(f"line {at + 1}: the fence has no command; add a `headwise VERB …` line")
    found.fences.append(Fence(at, last, (start, start + len(word)), state, match[2] or "", given, commands))
    return last


def block_name(name: str) -> str:
    """`name`, if it is valid as the name of a folder, in a comment and in a cell of a table.

    Raises:
        HeadwiseError: it cannot.
    """
    folder_name(name, "block", reserved=("old",))
    for part in ("--", "<", ">", "|", "`", " vs "):
        if part in name:
            raise HeadwiseError(f"block {name!r} has {part!r} in its name; choose another name")
    return name


def _paragraph_end(found: Document, at: int) -> int:
    last = at
    while last + 1 < len(found.lines):
        line = _bare(found, last + 1)
        stops = (_FENCE, _HEADING, _COMPARE, _HYPOTHESIS, MARK)
        if not line.strip() or "<!--" in line[:7] or any(stop.fullmatch(line) for stop in stops):
            break
        last += 1
    return last


def claim(at: int, text: str, section: str) -> Compare:
    """The comparison that a line states.

    Raises:
        HeadwiseError: it states none; names the line.
    """
    text = " ".join(text.replace("`", "").strip("*_ ").split())
    match = _CLAIM.fullmatch(text) if len(text) <= LONGEST_CLAIM else None
    if match is None:
        raise HeadwiseError(
            f"line {at + 1}: {text[:120]!r} is not `A vs B, MEASURE, lower|higher|equal[, at least X]`, such "
            "as `Compare: wide vs base, val_loss, lower, at least 0.01`"
        )
    a, b, measure, direction, smallest = match.groups()
    try:
        one_of("direction", direction, DIRECTIONS)
        if smallest is not None:
            smallest_difference(smallest, None)
    except HeadwiseError as error:
        raise HeadwiseError(f"line {at + 1}: {error}") from None
    if direction == "equal" and smallest is None:
        raise HeadwiseError(
            f"line {at + 1}: no interval can show that two means are exactly equal; add the smallest "
            "difference that matters, such as `, at least 0.01`"
        )
    if a == b:
        raise HeadwiseError(f"line {at + 1}: {a!r} is compared with itself; name two groups")
    return Compare(at, a, b, measure, direction, smallest, section)


def _refuse_double(found: Document) -> None:
    seen: dict[str, int] = {}
    pairs = [(compare.text, compare.at + 1, "comparison") for compare in found.compares]
    pairs += [(mark.name, mark.first + 1, "result") for mark in found.marks]
    for name, line, what in pairs:
        if (before := seen.get(f"{what} {name}")) is not None:
            raise HeadwiseError(
                f"line {line}: the {what} {name!r} is also in line {before}; delete one of them"
            )
        seen[f"{what} {name}"] = line
