"""A section of a study's report that a question or a kind of attention adds.

A section reads runs, keeps what it found as JSON-able data under its name in `report.json`, and shows it as
tables, figures and, on the page, plots that its script draws into `<div id="NAME-plots">`. The report is
built from a list of sections and imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from headwise.analysis.honesty import Flag
from headwise.report.tables import Table
from headwise.runs.read import Run, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Found:
    """What a section may read.

    Attributes:
        runs: all runs of the study.
        grids: variant -> [(run, whether it may be averaged, its `atlas.grid`)].
        curves: variant -> its curves over training.
        study: the study itself, for its plan and its trials; None where there is none.
    """

    runs: list[Run]
    grids: dict[str, list[tuple[Run, bool, dict[str, Any]]]]
    curves: dict[str, Any]
    study: Study | None = None


class Titled(NamedTuple):
    """A table with its own heading, or none; on the page it may be folded away."""

    table: Table
    title: str = ""
    folded: bool = False


class Drawn(NamedTuple):
    """A figure, its title and its file's name."""

    figure: Figure
    title: str
    file: str


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        name: key in `report.json` and anchor on the page.
        title: heading.
        link: word in the page's navigation.
        collect: reads the runs; gives JSON-able data, or an empty list or dictionary where there is nothing.
        tables: of that data.
        figures: of that data and the names of all variants, which decide the colours.
        flags: of that data, what a reader must know before believing a comparison.
        note: a sentence below the page's plots.
        exports: of all runs, files of text that lie beside the report, by name; none where there is nothing.
        script: file of JavaScript that draws the plots; it reads the data at `report.NAME`.
    """

    name: str
    title: str
    link: str
    collect: Callable[[Found], Any]
    tables: Callable[[Any], list[Titled]]
    figures: Callable[[Any, list[str]], list[Drawn]] = lambda data, variants: []
    flags: Callable[[Any], list[Flag]] = lambda data: []
    note: str = ""
    exports: Callable[[list[Run]], dict[str, str]] = lambda runs: {}
    script: Path | None = None
