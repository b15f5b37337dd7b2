"""Plans the runs, studies and other verbs of a notebook's blocks, and checks them before anything starts."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.config.run import from_flags
from headwise.errors import HeadwiseError, one_of
from headwise.names import cleaned, folder_name
from headwise.notebook.commands import STUDIES, Command
from headwise.notebook.document import Compare, Document, Fence
from headwise.notebook.identity import Identities, fingerprint
from headwise.notebook.naming import commands_sum
from headwise.reading import parse_yaml
from headwise.study.configure import with_numbers
from headwise.study.fit import NO_FIT
from headwise.study.plan import PlannedRun, planned_runs, waiting
from headwise.study.study import Study
from headwise.training.distributed import find_device
from headwise.training.run import refuse_device

if TYPE_CHECKING:
    from headwise.config.run import Config

HOW = ("workers", "device", "size", "command")
"""Keys of a study that change how it is executed, and not its results."""

WITHOUT = ("--seed", "--out", "--device")
LONGEST_LABEL = 60
LONGEST_NUMBER = 40


@dataclass(frozen=True)
class Options:
    """The options of `notebook run` that change the plan.

    Attributes:
        folder: the notebook's folder, which is the working folder.
        stem: the notebook's name without `.md`.
        only: the names of the blocks to run; empty for all.
        device: the device of all runs; None to keep the device of each configuration.
        read_study: parses the arguments of `study` and `sweep` into the study and its `--out`.
        load_plugins: imports each `--plugins MODULE` and returns the other arguments.
    """

    folder: Path
    stem: str
    only: tuple[str, ...]
    device: str | None
    read_study: Callable[[str, Sequence[str]], tuple[Study, Path | None]]
    load_plugins: Callable[[list[str]], list[str]]

    @property
    def runs(self) -> Path:
        """The default folder of runs."""
        return self.folder / "runs" / self.stem


@dataclass(frozen=True)
class Item:
    """A run of a block: its group, its identity, those of its configuration and data, and its line."""

    run: PlannedRun
    group: str
    id: str
    configuration: str
    data: str
    line: int


@dataclass(frozen=True)
class Verb:
    """Another verb of a block, with its place among the block's commands and its folder."""

    command: Command
    id: str
    folder: Path


@dataclass
class Block:
    """A planned block.

    Attributes:
        steps: its runs and verbs, in order. Runs may be executed at the same time, verbs run alone.
        studies: each with the folder that holds the study's folder.
        id: its fingerprint, a checksum of `commands`, `code`, `configuration` and `data`.
    """

    name: str
    fence: Fence
    steps: list[Item | Verb] = field(default_factory=list)
    studies: list[tuple[Study, Path]] = field(default_factory=list)
    id: str = ""
    code: str = ""
    configuration: str = ""
    data: str = ""

    @property
    def items(self) -> list[Item]:
        """Its runs."""
        return [step for step in self.steps if isinstance(step, Item)]

    @property
    def verbs(self) -> list[Verb]:
        """Its other verbs."""
        return [step for step in self.steps if isinstance(step, Verb)]

    @property
    def commands(self) -> str:
        """A checksum of its commands."""
        return commands_sum(self.fence)


def plan_blocks(
    document: Document, blocks: dict[str, Fence], options: Options, identities: Identities
) -> list[Block]:
    """Plan every block, top to bottom.

    Raises:
        HeadwiseError: an invalid configuration or study, one folder for two runs, a run twice in a block, or
            a comparison of an unknown group; with the number of the line.
    """
    for name in options.only:
        one_of("--only", name, blocks)
    taken: dict[str, int] = {}
    read: dict[tuple[str, ...], Config] = {}
    found = []
    for name, fence in blocks.items():
        block = _plan(name, fence, options, identities, read)
        for item in block.items:
            out = os.path.realpath(str(item.run.config.out))
            if (line := taken.get(out)) is not None:
                raise HeadwiseError(
                    f"the runs in lines {line} and {item.line} have the same folder, {out}; give each its "
                    "own --out"
                )
            taken[out] = item.line
        found.append(block)
    _refuse_nested(taken, options.folder)
    refuse_unknown(document.compares, {group for block in found for group in _groups(block)}, blocks)
    return found


def _refuse_nested(taken: dict[str, int], notebook: Path) -> None:
    """Refuse a run whose folder holds the notebook or another run: what is put aside is a folder."""
    for inner, line in [(os.path.realpath(notebook), 0), *taken.items()]:
        for outer in map(str, Path(inner).parents if line else (Path(inner), *Path(inner).parents)):
            if outer in taken:
                what = f"that of line {line}" if line else "the notebook"
                raise HeadwiseError(f"line {taken[outer]}: --out {outer} holds {what}; give it another")


def _groups(block: Block) -> set[str]:
    """The groups that a block has, or may have once what they wait for has ended."""
    found = {item.group for item in block.items}
    for study, root in block.studies:
        found |= {f"{block.name}/{name}" for name in waiting(study, root)}
    return found


def refuse_unknown(compares: Sequence[Compare], groups: Collection[str], blocks: Collection[str]) -> None:
    """Refuse a comparison of groups that the notebook does not have.

    Raises:
        HeadwiseError: a group is unknown; with the line of the comparison and the known groups.
    """
    for compare in compares:
        for name in (compare.a, compare.b):
            if name in groups:
                continue
            inside = [group for group in groups if group.startswith(f"{name}/")]
            if name in blocks and inside:
                reason = f"block {name!r} has several groups; name one of {', '.join(inside)}"
            else:
                reason = str(_unknown(name, groups))
            raise HeadwiseError(f"line {compare.at + 1}: {reason}")


def _unknown(name: str, groups: Collection[str]) -> HeadwiseError:
    if not groups:
        return HeadwiseError(f"{name!r} is compared, but the notebook has no runs")
    try:
        one_of("the group of runs", name, groups)
    except HeadwiseError as error:
        return error
    raise AssertionError(name)


def _plan(
    name: str,
    fence: Fence,
    options: Options,
    identities: Identities,
    read: dict[tuple[str, ...], Config],
) -> Block:
    block = Block(name, fence, code=identities.code)
    data: list[str] = []
    configurations: list[str] = []
    trained = [command for command in fence.commands if command.verb == "train"]
    labels = _labels(trained)
    if sum(command.verb in STUDIES for command in fence.commands) > 1:
        raise HeadwiseError(
            f"line {fence.line}: block {name!r} has two studies; give each a fence of its own"
        )
    seen: dict[str, int] = {}
    for number, command in enumerate(fence.commands):
        if command.verb == "train":
            label = labels[command.line]
            group = f"{name}/{label}" if label else name
            config = _configured(command, options, read)
            config = dataclasses.replace(config, out=_out(command, config, name, label, options))
            items = [_item(_planned(config, group), group, command.line, identities)]
            if (line := seen.get(twin := fingerprint([label, config.seed]))) is not None:
                raise command.wrong(
                    f"this run repeats the run in line {line}: the same seed twice is not two seeds"
                )
            seen[twin] = command.line
            configurations.append(items[0].configuration)
        elif command.verb in STUDIES:
            block.studies.append(_study(block, command, options))
            about_study = dataclasses.asdict(block.studies[-1][0])
            configurations.append(fingerprint([about_study[key] for key in about_study if key not in HOW]))
            try:
                items = study_items(block, *block.studies[-1], identities)
            except HeadwiseError as error:
                raise command.wrong(error) from None
        else:
            found, about = identities.verb(command)
            block.steps.append(Verb(command, found, options.runs / name / "verbs" / f"{number + 1}-{found}"))
            data.append(about)
            continue
        block.steps += items
        data += [item.data for item in items]
    block.configuration, block.data = fingerprint(configurations), fingerprint(sorted(set(data)))
    block.id = fingerprint([block.commands, block.code, block.configuration, block.data])
    return block


def _item(run: PlannedRun, group: str, line: int, identities: Identities) -> Item:
    return Item(run, group, *identities.run(run.config), line)


def _planned(config: Config, label: str) -> PlannedRun:
    device = find_device(config.device)
    try:
        refuse_device(config, device)
        skip = None
    except HeadwiseError as error:
        skip = str(error)
    return PlannedRun(label, config, skip, NO_FIT)


def _configured(command: Command, options: Options, read: dict[tuple[str, ...], Config]) -> Config:
    """The configuration of a `train` line; lines that differ in the seed only are read once."""
    try:
        words = tuple(options.load_plugins(list(command.without(*WITHOUT))))
        seed = command.value("--seed")
        config = _parsed(words, read)
        if seed is not None:
            config = dataclasses.replace(config, seed=_seed(seed))
        config.validate()
        return dataclasses.replace(
            config, device=options.device or command.value("--device") or config.device
        )
    except HeadwiseError as error:
        raise command.wrong(error) from None


def _parsed(words: tuple[str, ...], read: dict[tuple[str, ...], Config]) -> Config:
    """The configuration of flags; one that differs from an earlier one in its last numbers is not parsed."""
    if words not in read:
        flags = _pairs(words)
        numbers: dict[str, float] = {}
        while flags and (number := _number(flags[-1])) and number[0] not in numbers:
            numbers |= [number]
            flags.pop()
        like = (*flags, "…", *sorted(numbers))
        found = with_numbers(read[like], numbers) if numbers and like in read else None
        read[words] = found or from_flags(words)
        read.setdefault(like, read[words])
    return read[words]


@functools.lru_cache(maxsize=4096)
def _number(flag: str) -> tuple[str, float] | None:
    """Key and value of `--key=number`; None where it is anything else."""
    key, _, text = flag.removeprefix("--").partition("=")
    value = parse_yaml(text) if text and len(text) <= LONGEST_NUMBER and ":" not in text else None
    if isinstance(value, bool) or not isinstance(value, int | float) or "." not in key:
        return None
    return key, value


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 19:
        raise HeadwiseError(f"seed: got {text[:30]}, expected a whole number")
    return int(text)


def _labels(commands: list[Command]) -> dict[int, str]:
    """Line -> the flags in which the command's group differs from the others; empty if there is one group."""
    words = {command.line: _flags(command) for command in commands}
    different = {tuple(flags) for flags in words.values()}
    if len(different) < 2:
        return dict.fromkeys(words, "")
    shared = set.intersection(*(set(flags) for flags in different))
    labels = {}
    for line, flags in words.items():
        text = " ".join(flag.removeprefix("--") for flag in flags if flag not in shared)
        labels[line] = text or "default"
    return labels


def _flags(command: Command) -> list[str]:
    """The arguments without seed and folder, a flag with its value as one: the last of each, sorted."""
    return sorted({flag.partition("=")[0]: flag for flag in _pairs(command.without(*WITHOUT))}.values())


def _pairs(words: Sequence[str]) -> list[str]:
    """Arguments, a flag with its value as one."""
    found: list[str] = []
    for word in words:
        if found and not word.startswith("--") and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _out(command: Command, config: Config, name: str, label: str, options: Options) -> str:
    if given := command.value("--out"):
        return os.path.normpath(options.folder / given)
    folder = options.runs / name
    if label:
        short = cleaned(label)[:LONGEST_LABEL].strip(" .~")
        short = short if short == cleaned(label) else f"{short}-{fingerprint(label)}"
        folder /= folder_name(short, "the group", reserved=("old", "verbs"))
    return str(folder / f"seed_{config.seed}")


def _study(block: Block, command: Command, options: Options) -> tuple[Study, Path]:
    try:
        study, root = options.read_study(command.verb, options.load_plugins(list(command.words)))
    except HeadwiseError as error:
        raise command.wrong(error) from None
    if root is None:
        study.name, root = block.name, options.runs
    study.device = options.device or study.device
    study.command = f"headwise notebook run {options.stem}.md"
    return study, options.folder / root


def study_items(block: Block, study: Study, root: Path, identities: Identities) -> list[Item]:
    """The runs of a block's study that can be planned now.

    Raises:
        HeadwiseError: an invalid configuration.
    """
    line = block.fence.commands[0].line
    return [_item(run, f"{block.name}/{run.variant}", line, identities) for run in planned_runs(study, root)]
