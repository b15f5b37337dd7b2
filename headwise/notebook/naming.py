"""The names of a notebook's blocks, from the document alone."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.names import refuse_clash
from headwise.notebook.commands import STUDIES, Command
from headwise.notebook.document import Document, Fence, block_name, checksum


def named(document: Document) -> dict[str, Fence]:
    """Every block by its name, top to bottom. Relative paths start at the working folder.

    Raises:
        HeadwiseError: a block without a name, or two blocks with one name; with their lines.
    """
    found: dict[str, Fence] = {}
    for fence in document.fences:
        name = fence.given or _own_name(fence)
        if (other := found.get(name)) is not None:
            raise HeadwiseError(
                f"the blocks in lines {other.line} and {fence.line} are both called {name!r}; rename one of "
                "them: ```headwise NAME"
            )
        found[name] = fence
    refuse_clash(((name, name) for name in found), "blocks")
    return found


def commands_sum(fence: Fence) -> str:
    """A checksum of a fence's commands; spaces and comments do not count."""
    return checksum(json.dumps([[command.verb, command.words] for command in fence.commands]))


def _own_name(fence: Fence) -> str:
    first = fence.commands[0]
    file = _study_file(first) if first.verb in STUDIES else None
    try:
        if file is not None:
            return block_name(_study_name(file))
        if out := first.value("--out"):
            return block_name(PurePath(out).name)
    except HeadwiseError as error:
        raise HeadwiseError(f"line {fence.line}: {error}") from None
    raise HeadwiseError(
        f"line {fence.line}: the block has no name; write ```headwise NAME, or add --out to its first command"
    )


def _study_file(command: Command) -> str:
    """The study's file: the argument that is neither a flag nor a flag's value."""
    before = ""
    for word in command.words:
        if not word.startswith("-") and (not before.startswith("--") or "=" in before):
            return word
        before = word
    raise command.wrong(f"`headwise {command.verb}` names no study file")


def _study_name(file: str) -> str:
    values = reading.read_yaml(file)
    name = values.get("name") if isinstance(values, dict) else None
    return name if isinstance(name, str) else Path(file).stem
