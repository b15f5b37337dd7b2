"""The command lines of a fence: `headwise VERB …`, quotes, continued lines, and nothing of a shell."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.errors import HeadwiseError, did_you_mean

RUNS = ("train",)
STUDIES = ("study", "sweep")
OTHERS = (
    "per-head-metrics", "report", "profile", "geometry", "intervene", "budget", "masks", "prune", "surgery",
    "generate", "export", "data", "bench",
)  # fmt: skip
VERBS = (*RUNS, *STUDIES, *OTHERS)
"""The verbs that make results. The others look, or act on what a notebook must not touch."""

REFUSED = {
    "--resume": "a notebook continues its runs itself",
    "--eval_only": "it trains nothing; use `headwise budget` or `headwise profile` to measure a run",
    "--eval-only": "it trains nothing; use `headwise budget` or `headwise profile` to measure a run",
    "--plan": "it runs nothing",
    "--help": "it runs nothing",
    "-h": "it runs nothing",
}
SHELL = {
    "|": "a pipe", ";": "a second command", "&": "a shell's &", ">": "a redirection", "<": "a redirection",
    "`": "a command substitution", "$": "a shell variable or substitution", "(": "a subshell",
    ")": "a subshell", "*": "a shell pattern", "?": "a shell pattern",
}  # fmt: skip
"""Characters that a shell would act on where they are not quoted."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        line: of the document, counted from 1.
        verb: one of `VERBS`.
        words: its arguments.
    """

    line: int
    verb: str
    words: tuple[str, ...]

    def value(self, flag: str) -> str | None:
        """The last value of `--flag VALUE` or `--flag=VALUE`; None where it is not given."""
        found = None
        for word, following in zip(self.words, (*self.words[1:], ""), strict=True):
            name, equals, value = word.partition("=")
            if name == flag:
                found = value if equals else following
        return found

    def without(self, *flags: str) -> tuple[str, ...]:
        """The arguments without these flags and their values."""
        kept, rest = [], iter(self.words)
        for word in rest:
            name, equals, _ = word.partition("=")
            if name not in flags:
                kept.append(word)
            elif not equals:
                next(rest, None)
        return tuple(kept)

    def wrong(self, reason: object) -> HeadwiseError:
        """An error with the line's number."""
        return HeadwiseError(f"line {self.line}: {reason}")


def read_commands(body: str, first: int) -> tuple[Command, ...]:
    """The commands of a fence's body.

    Args:
        body: its text, with any line endings.
        first: the number of its first line.

    Raises:
        HeadwiseError: something of a shell, another program, or a verb that makes no results; with its line.
    """
    lines = _words(body.replace("\r\n", "\n").replace("\r", "\n"), first)
    return tuple(_command(number, words) for number, words in lines)


def _command(line: int, words: list[str]) -> Command:
    program, verb = words[0], words[1] if len(words) > 1 else ""
    if program != "headwise":
        raise HeadwiseError(
            f"line {line}: {_shown(program)} is not headwise; a notebook runs `headwise VERB …` lines only"
        )
    if verb not in VERBS:
        raise HeadwiseError(
            f"line {line}: `headwise {_shown(verb)}` makes no results that a notebook runs"
            f"{did_you_mean(verb, VERBS)}; choose from {', '.join(VERBS)}"
        )
    command = Command(line, verb, tuple(words[2:]))
    for word in command.words:
        if reason := REFUSED.get(word.partition("=")[0]):
            raise command.wrong(f"{_shown(word)} has no place in a notebook: {reason}")
    return command


def _words(text: str, first: int) -> list[tuple[int, list[str]]]:
    """The words of each command, with its line: quotes and backslashes as in a shell, and no more."""
    found: list[tuple[int, list[str]]] = []
    words: list[str] = []
    word: str | None = None
    line = began = quoted_at = first
    quote, at = "", 0

    def wrong(reason: str) -> HeadwiseError:
        return HeadwiseError(f"line {line}: {reason}; a notebook runs `headwise VERB …` lines, not a shell")

    while at < len(text):
        letter, following = text[at], text[at + 1 : at + 2]
        at += 1
        if quote:
            if letter == quote:
                quote = ""
            elif quote == '"' and letter in "`$":
                raise wrong(f"{letter} is {SHELL[letter]}; write it in single quotes to mean the character")
            elif quote == '"' and letter == "\\" and following and following in '"\\$`\n':
                word = (word or "") + ("" if following == "\n" else following)
                line += following == "\n"
                at += 1
            else:
                word = (word or "") + letter
                line += letter == "\n"
        elif letter == "\\" and following == "\n":
            line, at = line + 1, at + 1
        elif letter == "\\":
            if following in (" ", "\t") and not text[at:].partition("\n")[0].strip():
                raise wrong("spaces after the backslash end the command early: delete them")
            word, at = (word or "") + following, at + 1
        elif letter in "'\"":
            quote, word, quoted_at = letter, word or "", line
        elif letter in " \t\n":
            if word is not None:
                words.append(word)
                word = None
            if letter == "\n":
                if words:
                    found.append((began, words))
                words, line = [], line + 1
        elif letter == "#" and word is None:
            at = text.find("\n", at) if "\n" in text[at:] else len(text)
        elif letter in SHELL:
            raise wrong(f"{letter} is {SHELL[letter]}; quote it to mean the character")
        else:
            if word is None and not words:
                began = line
            word = (word or "") + letter
    if quote:
        line = quoted_at
        raise wrong(f"a {quote} is not closed")
    if word is not None:
        words.append(word)
    return [*found, (began, words)] if words else found


def _shown(word: str) -> str:
    text = repr(word)
    return text if len(text) <= 80 else f"{text[:80]}…"
