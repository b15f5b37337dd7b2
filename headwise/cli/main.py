"""The command line: `headwise VERB …`. Verbs are imported when they are called, so that help is instant."""

from __future__ import annotations

import importlib
import os
import sys

from headwise.errors import HeadwiseError, did_you_mean

VERBS = {
    "train": "train one model and measure its heads",
    "study": "train variants over seeds, compare them, write the report",
    "per-head-metrics": "compare attention kinds head by head at equal FLOPs",
    "runs": "list runs, filtered and sorted",
    "report": "write the report of a study or of runs again",
    "profile": "measure every head of a checkpoint on real text",
    "show-config": "say what a profile will do, every decision and formula",
    "geometry": "singular values of every head's circuits, and what they predict",
    "intervene": "scale a head's query or remove a head, and measure what it causes",
    "budget": "loss against the share of the context that is kept, with the point of parity",
    "masks": "see which token of a prompt was masked by whom and when",
    "surgery": "add a head to every layer of a trained model, then train on",
    "generate": "write text with a cache that drops masked keys and frees their memory",
    "export": "write a run as a folder that Hugging Face transformers loads",
    "data": "make token shards from text, look into them",
    "bench": "measure speed against the reference, with JSON",
}  # fmt: skip


LONGEST = 1200
"""Characters of an error message."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for an error of the user's, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from headwise import __version__

        print(f"headwise {__version__}")
        return 0
    verb, *rest = argv
    try:
        if verb not in VERBS:
            known = ", ".join(VERBS)
            raise HeadwiseError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}; choose from {known}")
        module = importlib.import_module(f"headwise.cli.{verb.replace('-', '_')}")
        return module.main(rest)
    except HeadwiseError as error:
        print(f"headwise: {_shortened(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("headwise: stopped; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _shortened(message: str) -> str:
    """A message without the middle of what it quotes, where that is very long."""
    return message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"


def usage() -> str:
    """The list of verbs."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return (
        "headwise: a laboratory for attention heads\n\n"
        f"usage: headwise VERB [options]\n\nverbs:\n{verbs}\n\n"
        "`headwise VERB --help` tells the options of one."
    )


if __name__ == "__main__":
    sys.exit(main())
