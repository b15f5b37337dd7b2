"""`headwise notebook`: run the experiments of a Markdown file, show their state, write a page about them."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.errors import HeadwiseError

if TYPE_CHECKING:
    from headwise.study.study import Study

DESCRIPTION = (
    "A notebook is a Markdown file. Its ```headwise fences hold headwise commands, `Hypothesis:` paragraphs "
    "state the expected results, and every `Compare:` line is decided by statistics over seeds. Paths are "
    "relative to the notebook's folder."
)


def main(argv: list[str]) -> int:
    """Carry out one action; returns the exit code."""
    if argv[:1] == ["import"]:
        from headwise.notebook.log import command

        return command.main(argv[1:])
    arguments = _parser().parse_args(argv)
    action = {"run": _run, "status": _status, "new": _new, "report": _report}[arguments.action]
    return action(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headwise notebook", description=DESCRIPTION, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, what: str) -> argparse.ArgumentParser:
        description = f"{what[0].upper()}{what[1:]}."
        one = actions.add_parser(name, help=what, description=description, allow_abbrev=False)
        one.add_argument("notebook", help="a Markdown file")
        return one

    run = add("run", "run every block whose commands, code or data changed, and write the results under it")
    run.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    run.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="run only this block; can be repeated"
    )
    run.add_argument("--device", help="cpu, cuda or auto, for all train and study lines")
    run.add_argument(
        "--executor",
        default="local",
        help="where the runs are executed: local, ray or slurm (default: local)",
    )
    run.add_argument(
        "--watch",
        action="store_true",
        help="keep running, and run the notebook again whenever the file changes",
    )
    run.add_argument(
        "--replace-edited", action="store_true", help="also replace results that were edited by hand"
    )
    add("status", "show the state, the runs and the decisions of every block")
    actions.add_parser("import", help="translate the selective attention log into a notebook", add_help=False)
    add("new", "write a notebook that runs unchanged on a CPU in about a minute")
    report = add(
        "report", "write one HTML page: the noise floor, the decisions, each hypothesis with its result"
    )
    report.add_argument(
        "--out", metavar="FILE", help="file of the page (default: the notebook's name with .html)"
    )
    return parser


@contextlib.contextmanager
def _beside(notebook: str) -> Iterator[Path]:
    """Change to the notebook's folder; yields the notebook's absolute path."""
    path = Path(os.path.abspath(notebook))
    if path.exists() and not path.is_file():
        raise HeadwiseError(
            f"notebook {notebook} cannot be read: it is no regular file; give a Markdown file"
        )
    if not path.is_file():
        raise HeadwiseError(
            f"notebook {notebook} cannot be read: there is no such file; `headwise notebook new` writes one"
        )
    if places := os.environ.get("PYTHONPATH"):  # of processes that start in the notebook's folder
        os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, places.split(os.pathsep)))
    with contextlib.chdir(path.parent):
        yield path


def _run(arguments: argparse.Namespace) -> int:
    from headwise.errors import in_range, one_of
    from headwise.notebook.execute import EXECUTORS
    from headwise.notebook.planning import Options
    from headwise.notebook.running import How
    from headwise.notebook.watching import run_notebook
    from headwise.study.display import StudyDisplay

    in_range("--workers", arguments.workers, 1, 2**10)
    one_of("--executor", arguments.executor, EXECUTORS)
    with _beside(arguments.notebook) as path:
        options = Options(
            path.parent, path.stem, tuple(arguments.only), arguments.device, _read_study, _load_plugins
        )
        from headwise.cli.study import LOCK

        how = How(
            arguments.workers,
            arguments.executor,
            arguments.replace_edited,
            LOCK,
            _end_study,
            _say,
            StudyDisplay,
        )
        return run_notebook(path, options, how, watch=arguments.watch)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _load_plugins(words: list[str]) -> list[str]:
    from headwise.cli.main import with_plugins

    return with_plugins(words)


def _read_study(verb: str, words: Sequence[str]) -> tuple[Study, Path | None]:
    """The study of a `study` or `sweep` line, and its --out."""
    from headwise.cli.study import parser, study_of

    try:
        with contextlib.redirect_stderr(sys.stdout):
            arguments, flags = parser(verb, "").parse_known_args(list(words))
    except SystemExit:
        raise HeadwiseError(
            f"`headwise {verb}` does not take these arguments; `headwise {verb} --help` lists its arguments"
        ) from None
    study = study_of(arguments, flags, "")
    if verb == "sweep":
        study.fit_batch = True
    given = any(word.partition("=")[0] == "--out" for word in words)
    return study, Path(arguments.out) if given else None


def _end_study(folder: Path) -> None:
    from headwise import report
    from headwise.questions.sections import sections

    report.build(folder, sections=sections(), force=True)


def _status(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from headwise.notebook.status import look

    with _beside(arguments.notebook) as path:
        status = look(path)
        table = Table(header_style="bold", box=None, pad_edge=False)
        for name in ("block", "state", "done", "decision"):
            table.add_column(name, overflow="fold")
        for block in status.blocks:
            words = [
                f"{one.compare.direction} {one.compare.measure} "
                f"{'to' if one.compare.direction == 'equal' else 'than'} {one.compare.b}: {one.word}"
                f"{' (exploratory)' * (one.exploratory and one.decision is not None)}"
                for one in status.decided
                if one.compare.a.partition("/")[0] == block.name
            ]
            cells = (block.name, block.state, f"{block.done}/{block.total}", "\n".join(words))
            table.add_row(*(Text(cell) for cell in cells))
        console = Console()
        if not console.is_terminal:
            console = Console(width=240)  # a pipe has no width to fit
        console.print(table)
        for note in status.notes:
            _say(note)
    return 0


def _new(arguments: argparse.Namespace) -> int:
    from headwise.files import write_text
    from headwise.notebook.template import CONFIGURATION, template

    path = Path(arguments.notebook)
    shared = path.with_suffix(".yaml")
    for place in (path, shared):
        if os.path.lexists(place):
            raise HeadwiseError(f"{place} exists; give the name of a new file")
    if path.suffix.lower() not in (".md", ".markdown"):
        raise HeadwiseError(f"{path} is not a Markdown file; give a name that ends with .md")
    title = path.stem.replace("-", " ").replace("_", " ").strip().capitalize() or "Notebook"
    write_text(shared, CONFIGURATION)
    write_text(path, template(title, shlex.quote(shared.name)))
    print(f"{path}\n{shared}\nrun it: headwise notebook run {shlex.quote(str(path))}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from headwise.notebook.page import write_page
    from headwise.notebook.status import look

    out = Path(os.path.abspath(arguments.out)) if arguments.out else None
    with _beside(arguments.notebook) as path:
        status = look(path)
        for one in status.decided:
            print(f"{one.compare.text}: {one.decision.decision if one.decision else one.waits}")
        for note in status.notes:
            _say(note)
        page = write_page(status, out or path.with_suffix(".html"))
    print(f"page: {page}")
    return 0
