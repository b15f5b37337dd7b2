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
"""The verbs that produce results. The others only show something, or change runs and notebooks."""

REFUSED = {
    "--resume": "a notebook resumes its runs by itself",
    "--eval_only": "it trains nothing; use `headwise budget` or `headwise profile` to measure a run",
    "--eval-only": "it trains nothing; use `headwise budget` or `headwise profile` to measure a run",
    "--plan": "it runs nothing",
    "--help": "it runs nothing",
    "-h": "it runs nothing",
}
SHELL = {
    "|": "a pipe", ";": "a separator of commands", "&": "a shell operator", ">": "a redirection",
    "<": "a redirection",
    "`": "a command substitution", "$": "a shell variable or substitution", "(": "a subshell",
    ")": "a subshell", "*": "a shell pattern", "?": "a shell pattern",
}  # fmt: skip
"""Characters that have a meaning in a shell if they are not quoted."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        line: its line in the document, counted from 1.
        verb: one of `VERBS`.
        words: its arguments.
    """

    line: int
    verb: str
    words: tuple[str, ...]

    def value(self, flag: str) -> str | None:
        """The last value of `--flag VALUE` or `--flag=VALUE`; None if the flag is not given."""
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
        HeadwiseError: shell syntax, another program, or a verb that produces no results; with its line.
    """
    lines = _words(body.replace("\r\n", "\n").replace("\r", "\n"), first)
    return tuple(_command(number, words) for number, words in lines)


def _command(line: int, words: list[str]) -> Command:
    program, verb = words[0], words[1] if len(words) > 1 else ""
    if program != "headwise":
        raise HeadwiseError(
            f"line {line}: the command is {_shown(program)}; a notebook runs only `headwise VERB …` lines"
        )
    if not verb:
        raise HeadwiseError(f"line {line}: `headwise` has no verb; choose from {', '.join(VERBS)}")
    if verb not in VERBS:
        raise HeadwiseError(
            f"line {line}: a notebook does not run the verb {_shown(verb)}{did_you_mean(verb, VERBS)}; "
            f"choose from {', '.join(VERBS)}"
        )
    command = Command(line, verb, tuple(words[2:]))
    for word in command.words:
        if reason := REFUSED.get(word.partition("=")[0]):
            raise command.wrong(f"{_shown(word)} is not allowed in a notebook: {reason}")
    return command


def _words(text: str, first: int) -> list[tuple[int, list[str]]]:
    """The words of each command, with its line; only quotes and backslashes work as in a shell."""
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
                raise wrong(f"{letter} is {SHELL[letter]}; put a literal {letter} in single quotes")
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
                raise wrong("spaces after the backslash end the command early; delete the spaces")
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
            raise wrong(f"{letter} is {SHELL[letter]}; put a literal {letter} in quotes")
        else:
            if word is None and not words:
                began = line
            word = (word or "") + letter
    if quote:
        line = quoted_at
        raise wrong(f"a quotation mark ({quote}) is not closed")
    if word is not None:
        words.append(word)
    return [*found, (began, words)] if words else found


def _shown(word: str) -> str:
    text = repr(word)
    return text if len(text) <= 80 else f"{text[:80]}…"
