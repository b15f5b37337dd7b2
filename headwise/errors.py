"""Errors that are the user's to mend: one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadwiseError(Exception):
    """Something the user gave cannot be used. The message is one line: what was received, what to do."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the choice nearest to `name`, or an empty string."""
    nearest = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def one_of(what: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is among `choices`.

    Raises:
        HeadwiseError: it is not; the message lists the choices and names the nearest.
    """
    choices = list(choices)
    if value in choices:
        return value
    hint = did_you_mean(value, choices)
    raise HeadwiseError(f"{what} {value!r} is not known{hint}; choose from {', '.join(choices)}")
