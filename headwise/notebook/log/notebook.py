"""The blocks of a translated log: their names, their initial weights, and their commands."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from headwise.config.run import Config, from_dict
from headwise.errors import HeadwiseError
from headwise.notebook.log import sources
from headwise.notebook.log.counts import Counts
from headwise.notebook.log.defaults import defaults_of
from headwise.notebook.log.fences import Fence, Prose, split
from headwise.notebook.log.flags import read_flags
from headwise.notebook.log.presets import smallest
from headwise.notebook.log.shell import Call, read_script
from headwise.notebook.log.translate import BASE, Run, translate

LONGEST = 80
MOST_FENCES = 100_000
OPERATED = "operated"
STEP = "checkpoints/step_{:08d}"
STAND_IN_SEED = 1337


@dataclass
class Block:
    """A block of the notebook.

    Attributes:
        commands: words of each, `headwise` first.
        comments: lines above them.
        same: an earlier block with the same configuration; the commands of this one are then omitted.
        made: it makes initial weights for runs of the log, and is not itself a run of the log.
    """

    name: str
    commands: list[list[str]]
    comments: list[str]
    same: str | None = None
    made: bool = False


@dataclass
class Kept:
    """A fence that is kept as text: it has no run, or a run that could not be translated, with the reason."""

    fence: Fence
    reason: str | None = None


@dataclass
class Imported:
    """A translated log: its parts, top to bottom, the counts, and the shared configuration."""

    parts: list[Prose | Block | Kept]
    counts: Counts
    base: dict[str, Any]
    stem: str


@dataclass
class _Place:
    """A run from which later runs may start: its block, its seed, its steps."""

    name: str
    seed: int
    steps: int

    def keeps(self, step: int) -> bool:
        """Whether its folder holds the checkpoint of a step after its end; the last two are kept."""
        every = BASE["training.checkpoint_every"]
        last = [self.steps, (self.steps - 1) // every * every]
        return step > 0 and step in last


@dataclass
class _State:
    stem: str
    small: bool
    base: dict[str, Any]
    counts: Counts
    names: set[str] = field(default_factory=set)
    numbers: dict[str, int] = field(default_factory=dict)
    dirs: dict[str, _Place] = field(default_factory=dict)
    seen: dict[Any, _Place] = field(default_factory=dict)
    made: dict[Any, _Place] = field(default_factory=dict)
    checked: set[Any] = field(default_factory=set)

    @property
    def runs(self) -> str:
        return f"runs/{self.stem}"

    def folder(self, place: _Place) -> str:
        return f"{self.runs}/{place.name}/seed_{place.seed}"

    def scaled(self, values: dict[str, Any]) -> dict[str, Any]:
        return smallest(values) if self.small else values

    def check(self, values: dict[str, Any]) -> None:
        """Refuse an invalid configuration; equal ones are checked once."""
        key = frozenset(values.items())
        if key not in self.checked:
            configured(values).validate()
            self.checked.add(key)


def configured(values: dict[str, Any]) -> Config:
    """The configuration with these dotted keys, not validated."""
    config = copy.deepcopy(_default())
    for key, value in values.items():
        *path, last = key.split(".")
        section: Any = config
        for part in path:
            section = getattr(section, part)
        setattr(section, last, value)
    return config


def _default() -> Config:
    if not _DEFAULT:
        _DEFAULT.append(from_dict({"training.max_steps": 1}))
    return _DEFAULT[0]


_DEFAULT: list[Config] = []


def import_log(
    text: str,
    stem: str,
    *,
    preset: str = "full",
    reading: str = "meant",
    data: str | None = None,
    show: Callable[[int, int], None] = lambda done, all_: None,
) -> Imported:
    """Translate a log.

    Args:
        stem: the notebook's name without its ending; its runs lie below `runs/STEM`.
        data: the folder of token shards; None for the default.
        show: called with the number of fences done and the number of all fences.

    Raises:
        HeadwiseError: it has no fences, or too many.
    """
    parts = split(text)
    fences = sum(isinstance(part, Fence) for part in parts)
    if not fences:
        raise HeadwiseError("it has no fences; a log has its commands between lines of ```")
    if fences > MOST_FENCES:
        raise HeadwiseError(f"it has {fences:,} fences, but at most {MOST_FENCES:,} can be imported")
    full = BASE | ({"data.path": data} if data else {})
    small = preset == "smallest"
    state = _State(stem, small, smallest(full) if small else full, Counts(fences=fences))
    found: list[Prose | Block | Kept] = []
    done = 0
    for part in parts:
        if isinstance(part, Prose):
            state.counts.changed += part.changed
            found.append(part)
            continue
        blocks = _fence(part, state, full, reading)
        made = [block for block in blocks if isinstance(block, Block) and block.made]
        before = len(found) - bool(
            found and isinstance(found[-1], Prose)
        )  # its prose is the run's hypothesis
        found[before:before] = made
        found += [block for block in blocks if block not in made]
        done += 1
        show(done, fences)
    state.counts.distinct = len(state.seen)
    return Imported(found, state.counts, state.base, stem)


def _fence(fence: Fence, state: _State, full: dict[str, Any], reading: str) -> list[Prose | Block | Kept]:
    counts = state.counts
    counts.unclosed += not fence.closed
    script = read_script("\n".join(fence.body), fence.line + 1)
    if not script.calls:
        what = ", ".join(dict.fromkeys(script.steps)) or "no command"
        counts.not_runs.append((fence.line, what))
        return [Kept(fence)]
    counts.broken += script.broken
    counts.steps.update(script.steps)
    for step in script.steps:
        if step.startswith("git checkout"):
            reason = "a revision of the original program, which is not run here"
            counts.meaningless["git checkout", reason] += 1
    found: list[Prose | Block | Kept] = []
    for call in script.calls:
        counts.runs += 1
        try:
            run = _translated(call, full, reading)
            blocks = _blocks(run, fence, state, script.broken, script.steps)
        except HeadwiseError as error:
            counts.untranslated.append((call.line, str(error)))
            found.append(Kept(fence, str(error)))
            continue
        counts.translated += 1
        counts.states[run.defaults.name] += 1
        counts.inferred.update(run.inferred.keys())
        counts.meaningless.update(run.meaningless)
        if run.group:
            counts.meaningless["--group", "kept as a comment in the block; runs are grouped by block"] += 1
        counts.repeated += len(run.repeated)
        counts.without_kind += not run.names_kind
        found += blocks
    return found


def _translated(call: Call, full: dict[str, Any], reading: str) -> Run:
    asked = read_flags(call)
    run = translate(call, asked, defaults_of(call, asked), reading)
    run.values["data.path"] = full["data.path"]
    return run


def _blocks(
    run: Run, fence: Fence, state: _State, broken: list[tuple[int, str]], steps: list[str]
) -> list[Block]:
    """The block of a run, preceded by the blocks that make its initial weights."""
    state.check(run.values)
    values = state.scaled(run.values)
    state.check(values)
    added: list[Block] = []
    notes = list(run.notes)
    key = (frozenset(run.values.items()), run.start and dataclasses.astuple(run.start))
    first = state.seen.get(key) if state.small else None
    start = None if first else _place_start(run, state, added, notes)
    wanted = _cleaned(run.log_dir)
    name = _free_name(state, wanted)
    if wanted != PurePosixPath(run.log_dir).name:
        state.counts.renamed.append((run.log_dir, wanted))
        notes.append(f"called {run.log_dir!r} in the log")
    if name != wanted:
        state.counts.numbered.append((wanted, name))
        notes.append(f"another run of the log is also called {wanted}")
    block = Block(name, [], _comments(run, fence, notes, broken, steps))
    if first:
        block.same, place = first.name, first
    else:
        place = _Place(name, run.seed, run.values["training.max_steps"])
        state.seen.setdefault(key, place)
        block.commands = _commands(run, values, start, name, state)
        state.counts.sources += len(added)
    if run.log_dir:
        state.dirs[run.log_dir.removeprefix("./").rstrip("/")] = place
    return [*added, block]


def _free_name(state: _State, wanted: str) -> str:
    """An unused name, compared without case; a name that is taken gets a number."""
    number, name = state.numbers.get(wanted, 1), wanted
    while name.casefold() in state.names:
        number += 1
        name = f"{wanted}-{number}"
    state.numbers[wanted] = number
    state.names.add(name.casefold())
    return name


def _cleaned(log_dir: str) -> str:
    """The last part of a folder's name, without characters that a block's name cannot have."""
    name = PurePosixPath(log_dir).name
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    name = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", "_", name)).strip("._-") or "run"
    name = name[:LONGEST].strip("._-")
    return f"{name}_run" if name.casefold() in ("old", "verbs", OPERATED) else name


def _place_start(run: Run, state: _State, added: list[Block], notes: list[str]) -> str | None:
    """The place of the run's initial weights; blocks that make them are added to `added`."""
    if run.start is None:
        return None
    if run.start.source is None:
        what = "the model before a head is added to it, trained for one step, the shortest possible run"
        return _made(sources.fresh(run), f"fresh_{run.seed}", run.seed, state, added, what)
    source, note = sources.named(run.start.source)
    notes += [note] if note else []
    saved = sources.of_the_log(source)
    if saved and (place := state.dirs.get(saved[0])):
        folder = state.folder(place)
        if not state.small and place.keeps(saved[1]):
            return f"{folder}/{STEP.format(saved[1])}"
        notes.append(f"starts from that run's last weights instead of those of step {saved[1]:,}")
        return folder
    if state.small:
        notes.append(f"a small model replaces {source}")
        name = f"source_{_cleaned(source.rpartition('/')[0])}"
        what = f"a small model that replaces {source}, whose weights are not available"
        return _made(sources.stand_in(run, source), name, STAND_IN_SEED, state, added, what)
    return source


def _made(
    values: dict[str, Any], wanted: str, seed: int, state: _State, added: list[Block], comment: str
) -> str:
    """The folder of initial weights that an additional block makes; equal weights are made once."""
    values = state.scaled(values)
    state.check(values)
    key = (frozenset(values.items()), wanted, seed)
    if key not in state.made:
        name = _free_name(state, wanted)
        state.made[key] = _Place(name, seed, values["training.max_steps"])
        words = ["headwise", "train", "--config", f"{state.stem}.yaml", *_flags(values, state.base)]
        added.append(Block(name, [[*words, "--seed", str(seed)]], [comment], made=True))
    return state.folder(state.made[key])


def _commands(
    run: Run, values: dict[str, Any], source: str | None, name: str, state: _State
) -> list[list[str]]:
    train = ["headwise", "train", "--config", f"{state.stem}.yaml", *_flags(values, state.base)]
    end = ["--seed", str(run.seed)]
    start = run.start
    if start is None or source is None:
        return [[*train, *end]]
    if start.place is None or start.init is None:
        return [[*train, f"--init_from={source}", *end]]
    out = f"{state.runs}/{name}/{OPERATED}"
    surgery = ["headwise", "surgery", source, "--add-head", start.place, "--init", start.init]
    if source.endswith(".pt"):
        surgery += ["--source-heads", str(run.values["model.n_heads"] - 1)]
        surgery += ["--source-kind", kind] if (kind := sources.kind_of(source)) != "flash" else []
    left = {key: value for key, value in values.items() if key not in NOT_OPERATED}
    surgery += ["--config", f"{state.stem}.yaml", *_flags(left, state.base), *end, "--out", out]
    surgery += [f"--model.{size}={values[f'model.{size}']}" for size in ("n_heads", "head_dim")]
    return [surgery, [*train, f"--init_from={out}", *end]]


NOT_OPERATED = ("training.max_steps", "model.n_heads", "model.head_dim")
"""Keys that `surgery` does not get like the others: a length would start training, sizes are given
separately."""


def _flags(values: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Flags for the keys that differ from the shared file."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
        if base.get(key) != value
    ]


def _comments(
    run: Run, fence: Fence, notes: list[str], broken: list[tuple[int, str]], steps: list[str]
) -> list[str]:
    state = f" ({fence.info})" if fence.info else ""
    found = [f"the log, line {fence.line}{state}{f'; group {run.group}' if run.group else ''}:"]
    found += [f"    {line}" for line in fence.body]
    if "finished" in fence.info or "running" in fence.info:
        found.append(f"its state in the log is {fence.info}; without its results here, the block is planned")
    if run.inferred:
        told = ", ".join(f"{name}={value}" for name, value in run.inferred.items())
        found.append(f"inferred, from the defaults of the state '{run.defaults.name}': {told}")
    found += [f"line {line}: {what}" for line, what in broken]
    found += [
        f"{step}: a revision of the original program" for step in steps if step.startswith("git checkout")
    ]
    if run.meaningless:
        flags = ", ".join(dict.fromkeys(flag for flag, _ in run.meaningless))
        found.append(f"without a meaning here: {flags}")
    return found + notes
