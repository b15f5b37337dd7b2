"""The command line: `headwise VERB …`. Verbs are imported when they are called, so that help is instant."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headwise.errors import HeadwiseError, did_you_mean
from headwise.files import NO_ROOM, shortened

VERBS = {
    "train": "train one model and measure its heads",
    "study": "train variants over seeds, compare them, write the report",
    "sweep": "run a study with axes, such as lengths x ranks, in the memory there is",
    "notebook": "run the experiments of a Markdown file, and decide what they show",
    "per-head-metrics": "compare attention kinds head by head at equal FLOPs",
    "bisect": "find the commit that made a loss worse, with as many seeds as that takes",
    "runs": "list runs, filtered and sorted",
    "report": "write the report of a study or of runs again",
    "profile": "measure every head of a checkpoint on real text",
    "show-config": "say what a profile will do, every decision and formula",
    "geometry": "singular values of every head's circuits, and what they predict",
    "intervene": "scale a head's query or remove a head, and measure what it causes",
    "budget": "loss against the share of the context that is kept, with the point of parity",
    "masks": "see which token of a prompt was masked by whom and when",
    "prune": "remove heads by a measure, and see whether it tells which heads are needed",
    "surgery": "add a head to every layer of a trained model, then train on",
    "generate": "write text with a cache that drops masked keys and frees their memory",
    "export": "write a run as a folder that Hugging Face transformers loads",
    "data": "make token shards from text, look into them",
    "bench": "measure speed against the reference, with JSON",
}  # fmt: skip


LONGEST = 1200
"""Characters of an error message."""

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
"""The exit codes after Ctrl-C and after SIGTERM, as a shell has them."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for an error of the user's, 130 after Ctrl-C.

    SIGTERM stops a verb as Ctrl-C does, so that what it was writing is swept, with exit code 143. Training,
    while it runs, has a way of its own for both: it saves first.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from headwise import __version__

        print(f"headwise {__version__}")
        return 0
    _print_any_name()
    with _terminable() as terminated:
        code = _run(*argv)
    return TERMINATED if code and terminated else code


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """Let SIGTERM raise what Ctrl-C raises, once; yields a list that is no longer empty when it came."""
    came: list[int] = []

    def stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would leave the cleaning half done
        came.append(number)
        raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield came
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(verb: str, *arguments: str) -> int:
    rest = list(arguments)
    try:
        _refuse_unreadable(rest)
        if verb not in VERBS:
            known = ", ".join(VERBS)
            raise HeadwiseError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}; choose from {known}")
        rest = with_plugins(rest)
        module = importlib.import_module(f"headwise.cli.{verb.replace('-', '_')}")
        code: int = module.main(rest)
        sys.stdout.flush()
        return code
    except HeadwiseError as error:
        return _say(_shortened(str(error)))
    except KeyboardInterrupt:
        print("headwise: stopped; what was finished is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            return _say(f"{NO_ROOM[error.errno]}; what was finished before is kept")
        if error.filename is None:
            raise
        return _say(f"{shortened(str(error.filename))} cannot be used: {error.strerror}; give another")


def _say(line: str) -> int:
    """Print an error of the user's; returns its exit code."""
    print(f"headwise: {line}", file=sys.stderr)
    return 2


def _print_any_name() -> None:
    """Let names of files that are not UTF-8 be printed as the bytes that they are."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refuse_unreadable(arguments: list[str]) -> None:
    """Refuse an argument that no file of a run could record.

    Raises:
        HeadwiseError: it is not UTF-8.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            message = f"the argument {argument!r} is not UTF-8; rename the file or folder"
            raise HeadwiseError(message) from error


def with_plugins(argv: list[str]) -> list[str]:
    """`argv` without every `--plugins MODULE`, which is imported: it registers kinds for any verb."""
    names: list[str] = []
    rest: list[str] = []
    flags = iter(argv)
    for flag in flags:
        name, equals, value = flag.partition("=")
        if name != "--plugins":
            rest.append(flag)
            continue
        value = value if equals else next(flags, "")
        if not value or value.startswith("-"):
            raise HeadwiseError("--plugins names no module; give one, such as --plugins my_package.my_module")
        names += [part.strip(" '\"") for part in value.strip("[]").split(",")]
    if names:
        from headwise.attention.kinds import load_plugins

        load_plugins(names)
    return rest


def _shortened(message: str) -> str:
    """A message on one line, without the middle of what it quotes where that is very long."""
    message = " ".join(line.strip() for line in message.splitlines())
    return message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"


def usage() -> str:
    """The list of verbs."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return (
        "headwise: a laboratory for attention heads\n\n"
        f"usage: headwise VERB [options]\n\nverbs:\n{verbs}\n\n"
        "`headwise VERB --help` tells the options of one.\n"
        "Every verb takes --plugins MODULE, whose import adds attention kinds of your own."
    )


if __name__ == "__main__":
    sys.exit(main())
