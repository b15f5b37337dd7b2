"""YAML as configurations are written, a key and a plain value a line: read line by line, or not at all.

Ten thousand runs have ten thousand configurations, and most lines of one are lines of all. What is not of
this form goes to `yaml_values.build`, which reads the same value from what is.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

from headwise.reading.opening import Unreadable
from headwise.reading.yaml_values import plain

_LINE = re.compile(
    r"( *)([A-Za-z_][A-Za-z0-9_.@/+-]*):(?: (-?[A-Za-z0-9_./+][A-Za-z0-9_./@=+-]*|\[\]|\{\}))?"
)
LONGEST_LINE = 500


class _Line(NamedTuple):
    """One line: spaces before it, its key, and its value; `opens` where none is given."""

    indent: int
    key: str
    value: Any
    opens: bool


def build_lines(text: str, *, depth: int) -> dict[str, Any] | None:
    """The mapping that a text of such lines stands for; None where a line is of another form."""
    if not text.endswith("\n") or not text.isascii():
        return None
    top: dict[str, Any] = {}
    around: list[tuple[int, dict[str, Any]]] = [(0, top)]
    opened: str | None = None  # the key of the line before, if it has no value
    for written in text[:-1].split("\n"):
        line = _read(written) if len(written) <= LONGEST_LINE else None
        if line is None:
            return None
        indent, here = around[-1]
        if line.indent > indent:
            if opened is None or len(around) >= depth:
                return None
            inner: dict[str, Any] = {}
            here[opened] = inner
            here = inner
            around.append((line.indent, inner))
        while line.indent < around[-1][0]:
            around.pop()
        indent, here = around[-1]
        if line.indent != indent or line.key in here:
            return None
        here[line.key] = line.value if line.value not in ([], {}) else type(line.value)()
        opened = line.key if line.opens else None
    return top


@lru_cache(maxsize=1 << 14)
def _read(text: str) -> _Line | None:
    found = _LINE.fullmatch(text)
    if not found:
        return None
    spaces, key, written = found.groups()
    if written is None:
        value: Any = None
    elif written in ("[]", "{}"):
        value = [] if written == "[]" else {}
    else:
        try:
            value = plain(written, 0)
        except Unreadable:
            return None
    try:
        if not isinstance(plain(key, 0), str):  # `null:` or `yes:`
            return None
    except Unreadable:
        return None
    return _Line(len(spaces), key, value, written is None)
