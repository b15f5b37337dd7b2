"""The state of a notebook, read from its document, its record and its run folders; nothing is executed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.notebook.decide import Decided, decided
from headwise.notebook.document import Document, Fence, read
from headwise.notebook.memory import Memory
from headwise.notebook.naming import commands_sum, named
from headwise.notebook.results import Group, groups_of
from headwise.notebook.verbs import state_of_verb
from headwise.runs.folder import RESULTS

DONE = (*RESULTS, "skipped")
TRIAL = "@trial="


@dataclass(frozen=True)
class BlockStatus:
    """A block: its state, the number of its runs and verbs that are done, and a note."""

    name: str
    fence: Fence
    groups: list[Group]
    state: str
    done: int
    total: int
    note: str


@dataclass(frozen=True)
class NotebookStatus:
    """A notebook as it stands."""

    path: Path
    document: Document
    memory: Memory
    blocks: list[BlockStatus]
    decided: list[Decided]
    notes: list[str]


def look(path: Path) -> NotebookStatus:
    """Read a notebook and the folders of its runs.

    Raises:
        HeadwiseError: the notebook or its record cannot be read.
    """
    document = read(path)
    try:
        fences = named(document)
    except HeadwiseError as error:
        raise HeadwiseError(f"{path.name}, {error}") from None
    memory = Memory.read(path)
    blocks = [_block(name, fence, memory) for name, fence in fences.items()]
    notes = [
        f"the result of {_named(document, mark.name)} (line {mark.first + 1}) was edited by hand; the "
        "numbers shown here are read from the runs"
        for mark in document.marks
        if mark.edited
    ]
    notes += [f"{block.name}: {block.note}" for block in blocks if block.note]
    return NotebookStatus(path, document, memory, blocks, decided(document, memory, fences), notes)


def _named(document: Document, name: str) -> str:
    return next((f"“{one.text}”" for one in document.compares if one.mark == name), repr(name))


def _block(name: str, fence: Fence, memory: Memory) -> BlockStatus:
    past = memory.blocks.get(name)
    if past is None or past["commands"] != commands_sum(fence):
        note = "" if past is None else "its commands changed after it was run"
        state = fence.state if past is None and fence.state in DONE else "planned"
        if past is None and fence.state in DONE:
            note = "its run folders are missing; the result in the document is shown"
        return BlockStatus(name, fence, [], state, 0, len(fence.commands), note)
    groups = groups_of(past, memory.path.parent)
    states = [ended_as(run.state, group.name) for group in groups for run in group.runs]
    states += [state_of_verb(memory.path.parent / verb) for verb in past["verbs"]]
    done = sum(state in DONE for state in states)
    note = ""
    if fence.state in DONE and not done:
        note, state = "its run folders are missing; the result in the document is shown", fence.state
    else:
        state = together(states)
    return BlockStatus(name, fence, groups, state, done, len(states), note)


def ended_as(state: str, group: str) -> str:
    """The state of a run for its block: a trial of a search that failed is done, and not repeated."""
    return "skipped" if state == "failed" and TRIAL in group else state


def together(states: Sequence[str]) -> str:
    """The state of a block from the states of its runs: exactly one of `headwise.runs.folder.STATES`."""
    found = set(states)
    if len(found) == 1:
        return found.pop()
    if "running" in found:
        return "running"
    if found & {"interrupted", "planned"}:
        return "interrupted"
    order = ("failed", "out_of_memory", "diverged", "timed_out", "finished", "skipped")
    return next((state for state in order if state in found), "planned")
