"""The text of the imported notebook: the log's prose, a block for each run, and a section about the
import."""

from __future__ import annotations

import re
import shlex
import textwrap
from typing import Any

from headwise import reading
from headwise.notebook.log.counts import plain, table
from headwise.notebook.log.defaults import READ, REPOSITORY, STATES
from headwise.notebook.log.fences import Prose
from headwise.notebook.log.notebook import Block, Imported, Kept

LONGEST_LINE = 4000


def notebook_text(imported: Imported) -> str:
    """The whole text of the notebook."""
    found: list[str] = []
    for part in imported.parts:
        if isinstance(part, Prose):
            found += part.lines
        elif isinstance(part, Block):
            found += _block(part)
        else:
            found += _kept(part)
    found += ["", *_about(imported)]
    return "\n".join(found) + "\n"


def shared_text(base: dict[str, Any]) -> str:
    """The configuration that the blocks share, as YAML."""
    nested: dict[str, Any] = {}
    for key, value in base.items():
        *path, last = key.split(".")
        section = nested
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    head = f"# Shared by all runs: the defaults of {REPOSITORY} in its later state, read on {READ}.\n"
    return head + reading.to_yaml(nested)


def command_text(words: list[str]) -> str:
    """A command on lines of about a hundred characters at most, continued by backslashes."""
    lines, line = [], ""
    for word in map(shlex.quote, words):
        if line and len(line) + len(word) > 98:
            lines.append(f"{line} \\")
            line = f"    {word}"
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def _block(block: Block) -> list[str]:
    comments = [f"# {part}".rstrip() for line in block.comments for part in _wrapped(line)]
    if block.same is not None:
        same = f"# {block.name}: the same configuration as block {block.same}, with another name or seed"
        return ["```text", same, *comments, "```"]
    commands = [line for words in block.commands for line in command_text(words).split("\n")]
    return [f"```headwise:planned {block.name}", *comments, *commands, "```"]


def _wrapped(line: str) -> list[str]:
    """A comment, wrapped; a line quoted from the log is not wrapped."""
    shown = plain(line, LONGEST_LINE)
    if shown.startswith("    "):
        return [shown]
    return textwrap.wrap(shown, 98, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _kept(kept: Kept) -> list[str]:
    fence = kept.fence
    info = re.sub(r"^headwise(?![\w-])", "text", fence.info)
    body = list(fence.body)
    said = []
    if kept.reason is not None:
        info = "text"
        said = ["", f"Not translated: {_prose(kept.reason)}"]
    return [f"{fence.mark}{info}", *body, fence.mark, *said]


def _prose(text: str) -> str:
    return re.sub(r"([\\`*_<>\[\]|&])", r"\\\1", plain(text, 400))


def _about(imported: Imported) -> list[str]:
    counts = imported.counts
    found = [
        "## About this import", "",
        f"`headwise notebook import` made this notebook from a log of `{REPOSITORY}`. The comments of each "
        "block hold the log's command, the inferred values and the differences. The results of the log are "
        "not "
        "included; all runs are planned.", "",
        *table(("count", "item"), [(count, what) for what, count in counts.rows()]),
    ]  # fmt: skip
    read = f"Values for flags that a command omits, read from the program's history on {READ}."
    found += ["", "### Defaults of the original program", "", read, ""]
    names = [name for name in STATES[-1].values if len({state.values.get(name) for state in STATES}) > 1]
    rows = [(state.name, counts.states[state.name], state.source,
             *(state.values.get(name, "") for name in names)) for state in STATES]  # fmt: skip
    found += table(("state", "runs", "read in", *names), rows)
    shared = [f"{name} {value}" for name, value in STATES[-1].values.items() if name not in names]
    found += ["", f"In every state: {_prose_list(shared)}."]
    if counts.inferred:
        found += ["", "### Values inferred", ""]
        found += table(("value", "runs"), counts.inferred.most_common())
    if counts.meaningless:
        found += ["", "### Flags and variables without a meaning here", ""]
        found += table(("flag", "count", "reason"), counts.flags())
    for title, pairs in (("Fences that are not runs", counts.not_runs),
                         ("Runs that could not be translated", counts.untranslated),
                         ("Broken continuations and quotation marks", counts.broken)):  # fmt: skip
        if pairs:
            found += ["", f"### {title}", "", *table(("line of the log", "description"), pairs)]
    for title, names_ in (("Duplicate names", counts.numbered), ("Names changed", counts.renamed)):
        if names_:
            found += ["", f"### {title}", "", *table(("in the log", "here"), names_)]
    return found


def _prose_list(parts: list[str]) -> str:
    return ", ".join(f"`{part}`" for part in parts)
