"""Parses the commands of a fence of the log as a shell would, without executing any.

A fence may change folders, pull, check out a revision, set variables and wrap its command for another
machine; its runs are calls of the original program. A line without its backslash is joined to the command
before it, as it was meant, and noted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

LONGEST = 1 << 16
"""The most characters of a fence; a longer one is not parsed."""

DEEPEST = 3
"""The deepest nesting of commands within quotation marks."""

TRAINER = "context_compression.train"
SCRIPT = "perplexity_loss_only.py"
FILES = (SCRIPT, "context_compression/train.py")

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_PREFIXES = ("nohup", "env", "time", "sudo", "exec", "command")
_PYTHON = re.compile(r"python(\d(\.\d+)?)?")
_LAUNCHERS = ("torch.distributed.run", "torch.distributed.launch")
_TAKE_VALUES = (
    "nproc_per_node", "nnodes", "node_rank", "master_port", "master_addr", "rdzv_backend", "rdzv_endpoint",
    "rdzv_id", "max_restarts", "local_addr", "log_dir",
)  # fmt: skip
"""Options of torchrun whose value may be the next word."""


@dataclass
class Call:
    """A run: a call of the original program.

    Attributes:
        line: its first line, counted from 1.
        script: whether it calls the earliest version, a script of one file.
        launched: `torchrun` or `python`.
        environment: the variables set for it, in order.
        launch: the options of the launcher.
        words: its arguments.
    """

    line: int
    script: bool
    launched: str
    environment: list[tuple[str, str]]
    launch: list[tuple[str, str]]
    words: list[str]


@dataclass
class Script:
    """The commands of a fence.

    Attributes:
        calls: its runs.
        steps: first words of its other commands, `git checkout REV` whole.
        broken: the lines of broken continuations and quotation marks, with the interpretation of each.
    """

    calls: list[Call] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)


def read_script(body: str, first: int) -> Script:
    """The commands of a fence's body, whose first line has the number `first`."""
    script = Script()
    if len(body) > LONGEST:
        script.steps.append(f"a text of {len(body):,} characters")
        return script
    _read(body, first, script, {}, 0)
    return script


def _read(body: str, first: int, script: Script, exported: dict[str, str], depth: int) -> None:
    for line, words in _joined(_commands(body, first, script), script):
        _command(line, words, script, exported, depth)


def _joined(commands: list[tuple[int, list[str]]], script: Script) -> list[tuple[int, list[str]]]:
    """Commands; a line that has only flags is joined to the command before it."""
    found: list[tuple[int, list[str]]] = []
    for line, words in commands:
        if words[0].startswith("--") and found:
            found[-1][1].extend(words)
            missing = " ".join(words)
            script.broken.append(
                (line, f"the line before has no backslash, so a shell ran the command without {missing}")
            )
        else:
            found.append((line, words))
    return found


def _command(line: int, words: list[str], script: Script, exported: dict[str, str], depth: int) -> None:
    environment = list(exported.items())
    rest = list(words)
    while rest:
        if match := _ASSIGNMENT.fullmatch(rest[0]):
            environment.append((match[1], match[2]))
        elif rest[0] == "export":
            for word in rest[1:]:
                if match := _ASSIGNMENT.fullmatch(word):
                    exported[match[1]] = match[2]
            return
        elif rest[0] not in _PREFIXES:
            break
        rest.pop(0)
    if not rest:
        return
    name = PurePosixPath(rest[0]).name
    wraps = name in ("run_in_remote.sh", "ssh") or (name in ("bash", "sh") and "-c" in rest[1:2])
    if wraps and len(rest) > 2 and depth < DEEPEST:
        inner = dict(environment)
        _read(rest[-1], line, script, inner, depth + 1)
        return
    call = _call(line, name, rest[1:], environment)
    if call is not None:
        script.calls.append(call)
    else:
        shown = rest[:3] if rest[:2] == ["git", "checkout"] else rest[:1]
        script.steps.append(" ".join(shown))


def _call(line: int, name: str, rest: list[str], environment: list[tuple[str, str]]) -> Call | None:
    python = bool(_PYTHON.fullmatch(name))
    if python and rest[:1] == ["-u"]:
        rest = rest[1:]
    if python and len(rest) > 1 and rest[0] == "-m" and rest[1] in _LAUNCHERS:
        name, python, rest = "torchrun", False, rest[2:]
    if not python and name != "torchrun":
        return None
    launch: list[tuple[str, str]] = []
    while rest and rest[0].startswith("--"):
        flag, equals, value = rest[0][2:].partition("=")
        rest = rest[1:]
        if not equals and flag.replace("-", "_") in _TAKE_VALUES and rest:
            value, rest = rest[0], rest[1:]
        launch.append((flag, value))
    module = len(rest) > 1 and rest[0] == "-m" and rest[1] == TRAINER
    file = bool(rest) and any(f"/{rest[0]}".endswith(f"/{one}") for one in FILES)
    if not module and not file:
        return None
    script = file and rest[0].endswith(SCRIPT)
    return Call(line, script, "python" if python else "torchrun", environment, launch, rest[1 + module :])


def _commands(text: str, first: int, script: Script) -> list[tuple[int, list[str]]]:
    """Words of every command, with its line. Redirections are left out."""
    found: list[tuple[int, list[str]]] = []
    words: list[str] = []
    word: str | None = None
    quote, began, line, at = "", first, first, 0
    skips = False  # the next word names the file of a redirection

    def end_word() -> None:
        nonlocal word, skips
        if word is not None and not skips:
            words.append(word)
        skips = skips and word is None
        word = None

    def end_command() -> None:
        nonlocal words, skips
        end_word()
        if words:
            found.append((began, words))
        words, skips = [], False

    while at < len(text):
        letter, following = text[at], text[at + 1 : at + 2]
        at += 1
        if word is None and not words:
            began = line
        if quote:
            if letter == quote:
                quote = ""
            elif quote == '"' and letter == "\\" and following and following in '"\\$`\n':
                word = (word or "") + ("" if following == "\n" else following)
                line += following == "\n"
                at += 1
            else:
                word = (word or "") + letter
                line += letter == "\n"
        elif letter == "\\":
            blanks = re.compile(r"[ \t]*(?:\n|\Z)").match(text, at)
            if blanks:
                if blanks[0].strip("\n"):
                    script.broken.append(
                        (line, "a space follows the backslash, so a shell ended the command here")
                    )
                end_word()
                line, at = line + 1, blanks.end()
            else:
                word, at = (word or "") + following, at + 1
        elif letter in "'\"":
            quote, word = letter, word or ""
        elif letter in " \t":
            end_word()
        elif letter in "<>" or (letter == "&" and following == ">"):
            if word is not None and not word.isdigit():
                end_word()
            word = None
            match = re.compile(r"[<>&]*(?:\d+(?=\s|\Z)|-(?=\s|\Z))?").match(text, at)
            at = match.end() if match else at
            skips = not re.search(r"&[\d-]+$", text[max(0, at - 4) : at])
        elif letter in "\n;|&()":
            end_command()
            line += letter == "\n"
        elif letter == "#" and word is None:
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
        else:
            word = (word or "") + letter
    if quote:
        script.broken.append(
            (began, f"a quotation mark ({quote}) is not closed; the command was read to the end of the fence")
        )
    end_command()
    return found
