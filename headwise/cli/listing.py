"""A table that never cuts numbers: text that does not fit is wrapped, other columns are left out and
named."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GAP = "  "
NARROWEST = 8
"""The width of columns of text, in cells, once every column that may be left out has been."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        cells: text, one a row.
        number: it is aligned to the right and never wrapped.
        wraps: the smallest width, in cells, to which its text is wrapped; the widest such column comes first.
        leaves: its place in the order in which columns are left out, 0 first; None for never.
        colours: rich's style by the text of a cell.
    """

    title: str
    cells: Sequence[str]
    number: bool = False
    wraps: int | None = None
    leaves: int | None = None
    colours: Mapping[str, str] | None = None


def table(
    columns: Sequence[Column], width: int | None, *, colour: bool = False
) -> tuple[list[str], list[str]]:
    """The lines of a table, its titles first, and the titles of the columns that were left out.

    Args:
        width: of the terminal, in cells; None for a file, where nothing is wrapped or left out.
        colour: write the colour codes of a terminal.
    """
    shown = list(columns)
    widths = {column.title: max(map(_width, (column.title, *column.cells))) for column in columns}
    least = {c.title: min(widths[c.title], max(c.wraps, _width(c.title))) for c in columns if c.wraps}
    if width is not None:
        while sum((widths | least)[c.title] for c in shown) + len(GAP) * (len(shown) - 1) > width:
            leaving = [column for column in shown if column.leaves is not None]
            if not leaving:
                least = {title: min(cells, NARROWEST) for title, cells in least.items()}
                break
            shown.remove(min(leaving, key=lambda column: column.leaves or 0))
        _narrow([c for c in shown if c.wraps], shown, widths, least, width)
    lines = [_joined([_padded(c.title, widths[c.title], c.number) for c in shown])]
    if colour:
        lines = [f"\x1b[1m{lines[0]}\x1b[0m"]
    for row in range(len(columns[0].cells) if columns else 0):
        lines += _row([(c, c.cells[row], widths[c.title]) for c in shown], colour)
    return lines, [column.title for column in columns if column not in shown]


def plain(text: str) -> str:
    """Text on one line, without control characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def _narrow(
    wrapping: list[Column], shown: list[Column], widths: dict[str, int], least: dict[str, int], width: int
) -> None:
    """Narrow the widest column of text until the table fits, or until all have their smallest width."""
    while (over := sum(widths[c.title] for c in shown) + len(GAP) * (len(shown) - 1) - width) > 0:
        wide = [c for c in wrapping if widths[c.title] > least[c.title]]
        if not wide:
            return
        widest = max(wide, key=lambda c: widths[c.title]).title
        others = sorted(widths[c.title] for c in wide if c.title != widest)
        floor = max(least[widest], others[-1] - 1 if others else 0)
        widths[widest] = max(floor, widths[widest] - over)


def _row(cells: list[tuple[Column, str, int]], colour: bool) -> list[str]:
    parts = [_wrapped(text, width) if column.wraps else [text] for column, text, width in cells]
    lines = []
    for number in range(max(map(len, parts))):
        line = []
        for (column, text, width), part in zip(cells, parts, strict=True):
            cell = _padded(part[number] if number < len(part) else "", width, column.number)
            style = (column.colours or {}).get(text) if colour else None
            line.append(_styled(cell, style) if style and number == 0 else cell)
        lines.append(_joined(line))
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    if _width(text) <= width:
        return [text]
    from rich.cells import chop_cells

    lines = []
    for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False):
        lines += [line] if _width(line) <= width else chop_cells(line, width)
    return lines or [""]


def _joined(cells: list[str]) -> str:
    return GAP.join(cells).rstrip(" ")


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _styled(text: str, style: str) -> str:
    from rich.color import ColorSystem
    from rich.style import Style

    return Style.parse(style).render(text, color_system=ColorSystem.STANDARD)
