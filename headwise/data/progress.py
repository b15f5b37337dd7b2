"""One progress line on standard error for work that takes a while: share, rate, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int | None, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of units just finished.

    Args:
        what: what is being done, the line's first words.
        total: number of units; None when not known.
        unit: the units' name; "B" shows bytes with their prefixes.
        done: units finished before, by an interrupted process.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:  # rich before 15 ends a bar with an empty line there, one that is off too
        yield lambda _: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:,.0f} {unit}/s")

    numbers = (DownloadColumn(), TransferSpeedColumn()) if unit == "B" else (MofNCompleteColumn(), Rate())
    columns = (TextColumn("{task.description}"), BarColumn(), *numbers, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda units: bar.advance(task, units)
