"""The counts of an import, as lines for a terminal and as tables of a notebook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Counts of an import.

    Attributes:
        meaningless: (flag, reason) -> number of flags without a meaning here.
        steps: first words of the other commands in fences with runs.
        not_runs: line and commands of each fence without a run.
        untranslated: line of each run that could not be translated, and the reason.
        broken: line of each broken continuation or quotation mark, and how it was read.
        numbered, renamed: names before and after.
        inferred: flag -> number of inferred values.
        states: state of the original program -> number of runs.
    """

    fences: int = 0
    runs: int = 0
    translated: int = 0
    distinct: int = 0
    without_kind: int = 0
    sources: int = 0
    repeated: int = 0
    unclosed: int = 0
    meaningless: Counter[tuple[str, str]] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    not_runs: list[tuple[int, str]] = field(default_factory=list)
    untranslated: list[tuple[int, str]] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)
    numbered: list[tuple[str, str]] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    inferred: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)

    def rows(self) -> list[tuple[str, int]]:
        """Every count with its name; unusual ones only if they are not 0."""
        always = [
            ("fences", self.fences),
            ("runs found", self.runs),
            ("runs translated", self.translated),
            ("distinct configurations", self.distinct),
            ("runs that name no attention kind", self.without_kind),
            ("values inferred from the original program's defaults", self.inferred.total()),
            ("duplicate names numbered", len(self.numbered)),
            ("flags and variables without a meaning here", self.meaningless.total()),
        ]
        seldom = [
            ("fences that are not runs", len(self.not_runs)),
            ("runs that could not be translated", len(self.untranslated)),
            ("names changed because a folder cannot have them", len(self.renamed)),
            ("broken continuations and quotation marks", len(self.broken)),
            ("flags given more than once", self.repeated),
            ("blocks added to make the initial weights of runs", self.sources),
            ("lines of prose escaped because a notebook would interpret them", len(self.changed)),
            ("fences that are not closed", self.unclosed),
        ]
        return always + [row for row in seldom if row[1]]

    def flags(self) -> list[tuple[str, int, str]]:
        """Flags without a meaning: flag, count, reason; the most frequent first."""
        found = sorted(self.meaningless.items(), key=lambda item: (-item[1], item[0]))
        return [(flag, count, reason) for (flag, reason), count in found]


def lines(counts: Counts) -> list[str]:
    """The counts for a terminal."""
    found = [f"{count:>6}  {what}" for what, count in counts.rows()]
    if counts.meaningless:
        found.append("without a meaning here:")
        found += [f"{count:>6}  {plain(flag)}: {reason}" for flag, count, reason in counts.flags()[:SHOWN]]
        found += _more(len(counts.flags()))
    for title, pairs in (("not runs", counts.not_runs), ("not translated", counts.untranslated),
                         ("broken", counts.broken)):  # fmt: skip
        if pairs:
            found.append(f"{title}:")
            found += [f"  line {line}: {plain(what, 300)}" for line, what in pairs[:SHOWN]]
            found += _more(len(pairs))
    return found


SHOWN = 40


def _more(n: int) -> list[str]:
    return [f"  … and {n - SHOWN:,} more, in the notebook"] if n > SHOWN else []


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table; markup of the log in its cells is escaped."""
    return [
        "| " + " | ".join(head) + " |",
        "| " + " | ".join("---" for _ in head) + " |",
        *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows),
    ]


def plain(text: str, most: int = 60) -> str:
    """A text from the log on one line, printable and shortened."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown if len(shown) <= most else f"{shown[:most]}…"


def _cell(value: object) -> str:
    text = plain(str(value), 400)
    for letter, instead in (("&", "&amp;"), ("<", "&lt;"), ("\\", "&#92;"), ("|", "&#124;"), ("`", "&#96;"),
                            ("[", "&#91;"), ("*", "&#42;"), ("_", "&#95;")):  # fmt: skip
        text = text.replace(letter, instead)
    return text
