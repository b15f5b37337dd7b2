"""`headwise masks`: for a prompt, which token was masked by whom and when."""

from __future__ import annotations

import argparse
from pathlib import Path

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import must_be_folder

MOST = 64 << 20
"""Bytes of a text to look at."""


def main(argv: list[str]) -> int:
    """Write the page, figures and numbers, and say the answers; returns the exit code."""
    args = _parser().parse_args(argv)
    source = "--prompt" if args.file is None else args.file
    text = args.prompt if args.file is None else _read(args.file)

    out = Path(args.out) if args.out else Path(args.run) / "masks"
    must_be_folder(out)

    from headwise.questions.masks.measure import look
    from headwise.questions.masks.page import statements, write

    found = look(
        args.run, text, layers=args.layers, max_tokens=args.max_tokens, device=args.device, source=source
    )
    for line in [*found.data["notes"], *(line for _, lines in statements(found.data) for line in lines)]:
        print(line)
    for path in write(found, out).values():
        print(path)
    return 0


def _read(file: str) -> str:
    try:
        return reading.read_text(file, limit=MOST)
    except reading.Unreadable as error:
        raise HeadwiseError(f"--file {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwise masks",
        description="Run a prompt through a run whose attention masks tokens, and write an interactive page, "
        "figures and JSON: what every token has left over time, and which queries took it.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="text to look at; token ids where data is no text")
    text.add_argument("--file", metavar="FILE", help="a file of text or code to look at")
    add("--layers", nargs="+", type=int, metavar="N", help="layers to look at, from 0 (default: all)")
    add("--max-tokens", type=int, default=256, metavar="N",
        help="of the text, at most the training length (%(default)s)")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda, cuda:1, or auto")
    add("--out", metavar="DIR", help="folder for the page (default: RUN/masks)")
    return parser
