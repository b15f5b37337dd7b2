"""The identity of a run: its configuration or command, the code that runs it, and the data that it reads.

A run whose identity changed runs again. The earlier run is moved to `old/IDENTITY/NAME` beside its folder,
and is moved back once that identity is needed again.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwise.attention import attention_kind
from headwise.config.run import Config, flatten, load, to_dict
from headwise.errors import HeadwiseError
from headwise.files import writing
from headwise.notebook.commands import Command
from headwise.runs.environment import git_changes, git_state
from headwise.runs.folder import RunFolder, state_of
from headwise.runs.read import Run
from headwise.training.run import SAME_RUN

WHOLE = 16 << 20
"""Files of up to so many bytes are identified by content, larger ones by size and time of modification."""

MOST_FILES = 100_000
OUTPUTS = ("--out", "--json", "--csv")
"""Flags of verbs that name output files."""

MARKS = ("manifest.json", "config.yaml", "study.yaml")
"""Files that identify a folder that a verb reads; the verb may write other files into it."""


def fingerprint(value: Any) -> str:
    """Eight hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


@functools.cache
def code_revision() -> str:
    """The commit of the running checkout; the version outside of one.

    Where files differ from the commit, `+dirty` and a checksum of the changes follow it.
    """
    from headwise import __version__

    state = git_state()
    changes = f".{git_changes()}" if state["git_dirty"] else ""
    return _code(state | {"headwise": __version__}) + changes


def _code(env: dict[str, Any]) -> str:
    commit = env.get("git_commit")
    return (
        f"{commit}{'+dirty' if env.get('git_dirty') else ''}" if commit else f"version {env.get('headwise')}"
    )


def short_code(code: str) -> str:
    """A revision of the code as pages and messages show it."""
    commit, plus, dirty = code.partition("+")
    return code if code.startswith("version") else f"{commit[:10]}{plus}{dirty}"


@dataclass
class Identities:
    """Identities of runs and verbs, top to bottom; the identity of a run includes those of its inputs."""

    code: str
    outs: dict[str, str] = field(default_factory=dict)
    _files: dict[str, str] = field(default_factory=dict)

    def run(self, config: Config) -> tuple[str, str, str]:
        """The identity of a run whose `out` is set, and the identities of its configuration and data."""
        same = (*SAME_RUN, "model.vocab_size", "init_from")
        values = {key: value for key, value in flatten(to_dict(config)) if key not in same}
        data = [self._named(config.data.path), self._named(config.data.tokenizer)]
        if config.data.name == "pystdlib":
            data.append(platform.python_version())
        start = config.init_from and (self._earlier(config.init_from) or self._named(config.init_from))
        facts = fingerprint([data, start])
        source = self._source(attention_kind(config.model.attention.kind))
        configuration = fingerprint([values, source] if source else values)
        found = fingerprint([configuration, self.code, facts])
        self.outs[os.path.abspath(str(config.out))] = found
        return found, configuration, facts

    def _source(self, kind: type) -> str | None:
        """The source of a kind that a plug-in brings: the code's revision does not know it."""
        package = kind.__module__.partition(".")[0]
        if package == __name__.partition(".")[0]:
            return None
        if package not in self._files:
            main = Path(inspect.getfile(sys.modules.get(package, kind)))
            files = sorted(main.parent.rglob("*.py")) if main.name == "__init__.py" else [main]
            self._files[package] = fingerprint([_file(file) for file in files[:MOST_FILES]])
        return self._files[package]

    def verb(self, command: Command) -> tuple[str, str]:
        """The identity of another verb, from its arguments and the files they name, and that of its data."""
        read = [word.partition("=")[2] or word for word in command.without(*OUTPUTS)]
        data = fingerprint([[word, self._earlier(word) or self._input(word)] for word in read])
        found = fingerprint([command.verb, command.words, self.code, data])
        for flag in OUTPUTS:
            if out := command.value(flag):
                self.outs[os.path.abspath(out)] = found
        return found, data

    def _earlier(self, name: str) -> str | None:
        """The identities of earlier runs whose output lies at, above or below a path; None if there are
        none."""
        path = os.path.abspath(name)
        if path in self.outs:
            return self.outs[path]
        near = [
            found
            for out, found in self.outs.items()
            if out.startswith(f"{path}{os.sep}") or path.startswith(f"{out}{os.sep}")
        ]
        return ",".join(near) or None

    def _named(self, name: str | None) -> str | None:
        """The identity of a file or of all files in a folder; the name itself if nothing has that name."""
        if name is None or not os.path.exists(name):
            return name
        if name not in self._files:
            files = [Path(name)] if os.path.isfile(name) else _files_in(Path(name))
            self._files[name] = fingerprint([[str(file), _file(file)] for file in files])
        return self._files[name]

    def _input(self, name: str) -> str | None:
        path = Path(name)
        try:
            if path.is_file():
                return self._named(name)
            return fingerprint([_file(path / mark) for mark in MARKS]) if path.is_dir() else None
        except (OSError, ValueError):  # not the name of a file
            return None


def _files_in(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        found += [Path(parent, name) for name in sorted(names)]
        if len(found) > MOST_FILES:
            raise HeadwiseError(
                f"{folder} has more than {MOST_FILES:,} files; make shards of them first (`headwise data`)"
            )
    return found


def _file(path: Path) -> Any:
    try:
        about = path.stat()
        if not path.is_file():
            return None
        if about.st_size > WHOLE:
            return [about.st_size, about.st_mtime_ns]
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def make_room(folder: RunFolder, wanted: str, known: str | None, config: Config, code: str) -> Path | None:
    """Move a run of another identity away, and move an earlier run of the wanted identity back.

    Args:
        known: the recorded identity of the run in the folder; None without a record.
        config, code: the wanted configuration and code, with which a run without a record is compared.

    Returns:
        The new place of the other run; None if there was no other run.

    Raises:
        HeadwiseError: it is running, or is no run's folder.
    """
    path, aside = folder.path, None
    if os.path.lexists(path) and known != wanted and not folder.holds_run():
        folder.refuse_taken()  # nothing but a run is ever moved
    if path.exists() and known != wanted and not (known is None and _is_same(folder, config, code)):
        if state_of(folder.read_status()) == "running":
            raise HeadwiseError(
                f"{path} is running with another configuration, code or data; stop that run first"
            )
        aside = _free(path.parent / "old" / (known or "unknown") / path.name)
        with writing(aside):
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside)
    return aside


def bring_back(folder: RunFolder, wanted: str) -> None:
    """Bring back the run of the wanted identity that was put aside, once nothing remembers another one there.

    Raises:
        HeadwiseError: it cannot be moved.
    """
    path = folder.path
    before = path.parent / "old" / wanted / path.name
    if not path.exists() and before.is_dir():
        with writing(path):
            before.rename(path)


def _is_same(folder: RunFolder, config: Config, code: str) -> bool:
    """Whether the files of a run without a record show the wanted configuration and code."""
    if not folder.holds_run():
        return not any(folder.path.iterdir())
    env = Run(folder.path).env
    before, now = (dict(flatten(to_dict(one))) for one in (load(folder.config), config))
    same = all(now.get(key) == value or key in SAME_RUN or key == "model.vocab_size"
               for key, value in before.items())  # fmt: skip
    return same and (not env or _code(env) == code)


def _free(path: Path) -> Path:
    numbered: Iterable[Path] = (path.with_name(f"{path.name}-{n}") for n in range(2, 10**6))
    return path if not path.exists() else next(one for one in numbered if not one.exists())
