"""`notebook run`: runs every changed block, top to bottom, and writes results into the document meanwhile."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.files import alone
from headwise.notebook import decide, results
from headwise.notebook.document import Document, Fence, read
from headwise.notebook.edit import Board
from headwise.notebook.execute import execute
from headwise.notebook.identity import Identities, bring_back, code_revision, make_room, short_code
from headwise.notebook.memory import Memory, PastBlock
from headwise.notebook.naming import named
from headwise.notebook.planning import Block, Item, Options, Verb, plan_blocks, study_items
from headwise.notebook.progress import Calm, Display
from headwise.notebook.status import ended_as, together
from headwise.notebook.verbs import run_verb, state_of_verb
from headwise.runs.folder import RESULTS, state_of
from headwise.study.plan import PlannedRun, waiting, write_plan

FINAL = (*RESULTS, "skipped")
LINE = re.compile(r"line \d|the (runs|blocks) in lines \d")
WINDOW = 8
"""Further waiting runs whose folders are read at each poll, beyond those that are executed at a time."""


@dataclass(frozen=True)
class How:
    """The options of `notebook run` that do not change the plan, and functions of the command line.

    Attributes:
        study_lock: name of the lock file in a study's folder.
        end_study: writes a study's report once its runs have ended.
        say: prints a line.
        display: creates the display of progress for a number of runs.
    """

    workers: int
    executor: str
    replace_edited: bool
    study_lock: str
    end_study: Callable[[Path], None]
    say: Callable[[str], None]
    display: Callable[[int], Display]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a notebook.

    Raises:
        HeadwiseError: another process holds it; the message names that process and the time it started.
    """
    target = Path(os.path.realpath(path))
    with alone(target.with_name(f".{target.name}.lock"), f"runs the notebook {path.name}"):
        yield


@dataclass
class Driver:
    """One pass over a notebook, started by `pass_over`."""

    path: Path
    options: Options
    how: How
    memory: Memory
    document: Document
    blocks: list[Block]
    board: Board
    identities: Identities
    fences: dict[str, Fence]
    states: dict[int, str] = field(default_factory=dict)
    began: float = field(default_factory=time.time)
    shown: dict[str, str] = field(default_factory=dict)

    def carry_out(self) -> bool:
        """Run everything; returns False if Ctrl-C stopped it."""
        steps = [(block, step) for block in self.blocks for step in block.steps]
        for is_run, group in itertools.groupby(steps, key=lambda pair: isinstance(pair[1], Item)):
            for complete in self._runs(group) if is_run else self._verbs(group):
                if not complete:
                    return False
        return True

    def finish(self) -> None:
        """Write all states, results and decisions that are still pending."""
        for block in self.blocks:
            for step in block.steps:
                self._look(step)
            self._write(block, last=True)
        decide.write(self.document, self.memory, self.fences, self.board, self.how.say)
        self.memory.write()
        self.board.flush(now=True)

    def state(self, block: Block) -> str:
        """The state of a block while the notebook runs, from the states read last."""
        states = [self.states.get(id(step), "planned") for step in block.steps]
        if "planned" in states and not set(states) <= {"planned", "interrupted"}:
            return "running"
        return together(["interrupted" if state == "stopped" else state for state in states])

    def _runs(self, group: Iterator[tuple[Block, Item | Verb]]) -> Iterator[bool]:
        """Execute a batch of runs, then the stages of studies that depend on it."""
        batch = [(block, step) for block, step in group if isinstance(step, Item)]
        studies = {id(block): block for block, _ in batch if block.studies}.values()
        with ExitStack() as stack:
            for block in studies:
                for study, root in block.studies:
                    folder = root / study.name
                    stack.enter_context(alone(folder / self.how.study_lock, f"works on the study {folder}"))
            while batch:
                for block in studies:
                    for study, root in block.studies:
                        write_plan(study, [item.run for item in block.items], root)
                complete = self._batch(batch)
                yield complete
                batch = [(block, item) for block in studies for item in self._further(block)]
            for block in studies:
                self._end_studies(block)

    def _batch(self, batch: list[tuple[Block, Item]]) -> bool:
        display = Calm(self.how.display(len(batch)))
        for block, item in batch:
            self._look(item)
            self._write(block)
        self.board.flush(now=True)

        def show(runs: Sequence[PlannedRun]) -> None:
            display(runs)
            self._watch(batch)

        try:
            return execute(
                [item.run for _, item in batch],
                workers=self.how.workers, executor=self.how.executor, folder=Path("runs"), show=show,
            )  # fmt: skip
        finally:
            display.close()
            self._watch(batch, everything=True)

    def _watch(self, batch: list[tuple[Block, Item]], *, everything: bool = False) -> None:
        """Read the states of the runs that may be executing, and write the blocks that changed."""
        seen, changed = 0, {}
        for block, item in batch:
            if not everything and self._ended(item):
                continue
            before = self.states.get(id(item))
            if self._look(item) != before:
                changed[id(block)] = block
            seen += 1
            if seen >= 2 * self.how.workers + WINDOW and not everything:
                break
        for block in changed.values():
            self._write(block)
        self.board.flush()

    def _ended(self, item: Item) -> bool:
        return self.states.get(id(item)) in (*FINAL, "failed", "stopped")

    def _look(self, step: Item | Verb) -> str:
        """Read the state of a step; one that failed before this pass counts as planned."""
        if isinstance(step, Verb):
            state = state_of_verb(step.folder)
        else:
            status = step.run.folder.read_status()
            state = ended_as(state_of(status), step.group)
            if state in ("failed", "interrupted"):
                if status.get("heartbeat", 0) < self.began:
                    state = "planned" if state == "failed" else state
                elif state == "interrupted":
                    state = "stopped"
        self.states[id(step)] = state
        return state

    def _write(self, block: Block, *, last: bool = False) -> None:
        state = self.state(block)
        if state == "running" and last:
            state = "interrupted"
        if self.shown.get(block.name) == state:
            return
        self.shown[block.name] = state
        self.board.state(block.name, state, block.id)
        if state not in ("planned", "running") and any(self._settled(step) for step in block.steps):
            past = self.memory.blocks[block.name]
            self.board.mark(block.name, results.text(block.name, past, self.memory, self.document.compares))

    def _settled(self, step: Item | Verb) -> bool:
        return self.states.get(id(step), "planned") not in ("planned", "running")

    def _verbs(self, group: Iterator[tuple[Block, Item | Verb]]) -> Iterator[bool]:
        for block, step in group:
            assert isinstance(step, Verb)
            if self._look(step) == "finished":
                self._write(block)
                continue
            shown = f"{block.name}: headwise {step.command.verb}"
            self.how.say(f"{shown} …  (log: {os.path.relpath(step.folder / 'log.txt')})")
            began = time.monotonic()
            self.board.state(block.name, "running", block.id)
            self.shown[block.name] = "running"
            complete = run_verb(step.folder, step.command.verb, step.command.words, self.board.flush)
            self.how.say(f"{shown}: {self._look(step)} after {time.monotonic() - began:.0f} s")
            self._write(block)
            self.board.flush()
            yield complete

    def _further(self, block: Block) -> list[Item]:
        """Further runs of a study, which can be planned now."""
        known = {item.run.config.out for item in block.items}
        further = []
        for study, root in block.studies:
            for item in study_items(block, study, root, self.identities):
                if item.run.config.out not in known:
                    further.append(item)
        block.steps += further
        if further:
            _make_rooms(further, self.memory, self.identities.code, self.options.folder, self.how.say)
            self.memory.blocks[block.name] = past_of(block, self.options.folder)
            self.memory.write()
            _bring_back(further)
        return further

    def _end_studies(self, block: Block) -> None:
        for study, root in block.studies:
            for name, reason in waiting(study, root).items():
                self.how.say(f"{block.name}/{name} was not run: it {reason}")
            if any(self.states.get(id(item)) in FINAL for item in block.items):
                if study.max_length_at:
                    from headwise.study.lengths import search_lengths

                    search_lengths(study, root)
                self.how.end_study(root / study.name)
        self.shown.pop(block.name, None)
        self._write(block)


def pass_over(path: Path, options: Options, how: How) -> int:
    """Run the changed blocks of a notebook, whose lock the caller holds; returns the exit code.

    Raises:
        HeadwiseError: the notebook has a fault; raised before anything runs.
    """
    document = read(path)
    with _naming(path):
        fences = named(document)
    if not fences:
        how.say(f"{path.name} has no headwise fences; nothing is run")
    memory = Memory.read(path)
    code = code_revision()
    identities = Identities(code)
    with _naming(path):
        everything = plan_blocks(document, fences, options, identities)
    planned = [block for block in everything if not options.only or block.name in options.only]
    blocks = [block for block in planned if not _up_to_date(block)]
    for block in planned:
        how.say(_reason(block, memory.blocks.get(block.name), up_to_date=block not in blocks))
    board = Board(path, {name: fence.commands for name, fence in fences.items()}, how.say, how.replace_edited)
    _say_marks(document, fences, how.say)
    decide.first_seen(document, memory, _ended_groups(everything, memory))
    for block in blocks:
        _make_rooms(block.items, memory, code, options.folder, how.say)
    for block in planned:
        if block in blocks or block.name not in memory.blocks:
            memory.blocks[block.name] = past_of(block, options.folder)
    memory.write()
    for block in blocks:
        _bring_back(block.items)
    driver = Driver(path, options, how, memory, document, blocks, board, identities, fences)
    complete = False
    try:
        complete = driver.carry_out()
    except KeyboardInterrupt:
        pass
    finally:
        driver.finish()
    states = [driver.state(block) for block in blocks]
    if not complete:
        return 130
    fine = all(state in ("finished", "skipped", "out_of_memory") for state in states)
    return 0 if fine else 1


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the notebook's name in front of errors that begin with the number of a line."""
    try:
        yield
    except HeadwiseError as error:
        if not LINE.match(str(error)):
            raise
        raise HeadwiseError(f"{path.name}, {error}") from error


def past_of(block: Block, folder: Path) -> PastBlock:
    """The record of a planned block."""
    return {
        "id": block.id, "code": block.code, "data": block.data, "commands": block.commands,
        "configuration": block.configuration,
        "runs": [
            {"path": relative(str(item.run.config.out), folder), "id": item.id, "group": item.group,
             "seed": item.run.config.seed}
            for item in block.items
        ],
        "verbs": [relative(str(verb.folder), folder) for verb in block.verbs],
        "study": next((relative(str(root / study.name), folder) for study, root in block.studies), None),
    }  # fmt: skip


def relative(path: str, folder: Path) -> str:
    """A path relative to the notebook's folder, with forward slashes."""
    return Path(os.path.relpath(path, folder)).as_posix()


def _up_to_date(block: Block) -> bool:
    """Whether the document records that the block, with its present ID, has ended."""
    return block.fence.state in RESULTS and block.fence.id == block.id


def _reason(block: Block, past: PastBlock | None, *, up_to_date: bool) -> str:
    """One line on why a block runs, or does not."""
    if up_to_date:
        return f"{block.name}: {block.fence.state}; its commands, code and data have not changed"
    if past is None or past["id"] == block.id or not block.fence.id:
        return f"{block.name}: {len(block.steps)} {'run' if len(block.steps) == 1 else 'runs'}"
    changed = []
    if past["commands"] != block.commands:
        changed.append("its commands changed")
    elif past["configuration"] != block.configuration:
        changed.append("a file that its commands name changed")
    if past["code"] != block.code:
        changed.append(f"the code changed from {short_code(past['code'])} to {short_code(block.code)}")
    if past["data"] != block.data:
        changed.append("its data or its initial weights changed")
    return f"{block.name}: runs again as far as necessary: {', '.join(changed)}"


def _make_rooms(
    items: list[Item], memory: Memory, code: str, folder: Path, say: Callable[[str], None]
) -> None:
    known = memory.identities()
    aside = []
    for item in items:
        was = known.get(relative(str(item.run.config.out), folder))
        if place := make_room(item.run.folder, item.id, was, item.run.config, code):
            aside.append(place)
    if aside:
        one = len(aside) == 1
        say(
            f"moved {len(aside)} earlier run{'' if one else 's'} to old "
            f"folders{'' if one else ', the first'}: {relative(str(aside[0]), folder)}"
        )


def _bring_back(items: list[Item]) -> None:
    for item in items:
        bring_back(item.run.folder, item.id)


def _say_marks(document: Document, fences: Collection[str], say: Callable[[str], None]) -> None:
    compares = {compare.mark for compare in document.compares}
    for mark in document.marks:
        if mark.name not in fences and mark.name not in compares:
            say(f"line {mark.first + 1}: the result {mark.name!r} belongs to no block; it is left unchanged")


def _ended_groups(blocks: list[Block], memory: Memory) -> set[str]:
    """Groups in which a run has ended, so that its numbers may have been seen."""
    runs = [(run["group"], memory.path.parent / run["path"]) for past in memory.blocks.values()
            for run in past["runs"]]  # fmt: skip
    runs += [(item.group, item.run.folder.path) for block in blocks for item in block.items]
    found = {item.group for block in blocks if block.fence.state in RESULTS for item in block.items}
    for group, path in runs:
        if group not in found and results.has_result(path):
            found.add(group)
    return found
