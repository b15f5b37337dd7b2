"""Errors that are the user's to mend: one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class HeadwiseError(Exception):
    """Something the user gave cannot be used. The message is one line: what was received, what to do."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the choice nearest to `name`, or an empty string."""
    nearest = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def in_range(
    key: str, value: float | None, least: float, most: float, *, above: bool = False, what: str = ""
) -> None:
    """Refuse a number that no run can have, NaN and infinity among them; None is left out.

    Args:
        above: `least` itself is refused too.
        what: a word on why, after the bounds.

    Raises:
        HeadwiseError: names the key, the value and the bounds.
    """
    if value is None or (least <= value <= most and not (above and value == least)):
        return
    bounds = f"above {least:.15g}" if above else f"at least {least:.15g}"
    if math.isfinite(value) and value > most:
        bounds = f"at most {most:.15g}"
    elif not math.isfinite(value):
        bounds = f"a number {bounds}"
    raise HeadwiseError(f"{key} is {_short(value)}; it must be {bounds}{what and f': {what}'}")


def _short(value: float) -> str:
    text = str(value)
    return text if len(text) <= 30 else f"{text[:12]}… ({len(text)} digits)"


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
