"""`headwise notebook import FILE --out notebook.md`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import write_text
from headwise.names import folder_name
from headwise.notebook.log.counts import lines
from headwise.notebook.log.notebook import import_log
from headwise.notebook.log.presets import PRESETS
from headwise.notebook.log.translate import READINGS
from headwise.notebook.log.write import notebook_text, shared_text

LIMIT = 16 << 20
"""Bytes of a log."""

DESCRIPTION = """Translate the selective attention log, a Markdown file whose fences are commands of
andrew-healey/context-compression, into a notebook, and print counts of the runs found, the values inferred
and the flags left out. A YAML file of the same name holds the configuration that the blocks share."""


def parser() -> argparse.ArgumentParser:
    """The arguments of the verb."""
    made = argparse.ArgumentParser(
        prog="headwise notebook import", description=DESCRIPTION, allow_abbrev=False
    )
    made.add_argument("file", help="the log: UTF-8, at most 16 MiB")
    made.add_argument("--out", required=True, metavar="FILE", help="the notebook, a new .md file")
    made.add_argument(
        "--preset", default="full", choices=PRESETS,
        help="full: the sizes of the log; smallest: each distinct configuration for a few steps on a CPU",
    )  # fmt: skip
    made.add_argument(
        "--reading", default="meant", choices=READINGS,
        help="meant: as the names of the flags promise; ran: as the original program computed, where known",
    )  # fmt: skip
    made.add_argument(
        "--data", metavar="FOLDER", help="folder of token shards (default: data/edu_fineweb10B)"
    )
    return made


def main(argv: list[str]) -> int:
    """Import a log; returns 1 if a run could not be translated."""
    arguments = parser().parse_args(argv)
    out = Path(arguments.out)
    shared = out.with_suffix(".yaml")
    if out.suffix.lower() not in (".md", ".markdown"):
        raise HeadwiseError(f"--out {arguments.out} is not a Markdown file; give a name that ends with .md")
    if not (folder_name(out.stem, "--out")[0].isalnum() or out.stem[0] == "_"):
        raise HeadwiseError(f"--out {arguments.out}: a notebook's name begins with a letter or a digit")
    for place in (out, shared):
        if os.path.lexists(place):
            raise HeadwiseError(f"{place} exists; give --out the name of a new file")
    try:
        text = reading.read_text(arguments.file, limit=LIMIT)
        if "\0" in text:
            raise reading.Unreadable(arguments.file, "it is not a text file: it contains a NUL character")
        imported = import_log(
            text, out.stem, preset=arguments.preset, reading=arguments.reading, data=arguments.data,
            show=_Progress(),
        )  # fmt: skip
    except reading.Unreadable as error:
        raise HeadwiseError(f"log {error}") from None
    except HeadwiseError as error:
        raise HeadwiseError(f"log {arguments.file} cannot be imported: {error}") from None
    write_text(shared, shared_text(imported.base))
    write_text(out, notebook_text(imported))
    print("\n".join(lines(imported.counts)))
    print(f"{out}\n{shared}\nrun it: headwise notebook run {shlex.quote(str(out))}")
    return 1 if imported.counts.untranslated else 0


class _Progress:
    """Shows the fences done in one line of a terminal, if the import takes longer than half a second."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self._said < 0.5 and (done < of or self._said == self._began)):
            return
        self._said = now
        rate = done / max(now - self._began, 1e-9)
        left = (of - done) / max(rate, 1e-9)
        end = "\n" if done == of else ""
        print(
            f"\r{done:,} of {of:,} fences, {rate:,.0f}/s, {left:.0f} s left ",
            end=end,
            file=sys.stderr,
            flush=True,
        )
