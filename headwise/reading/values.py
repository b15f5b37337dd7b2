"""JSON and YAML as plain values of bounded size and depth, and the schemas they are held against."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwise.reading.opening import MEGABYTE, Unreadable, read_text

JSON_LIMIT = 64 * MEGABYTE
YAML_LIMIT = MEGABYTE
DEPTH = 64
"""Lists and mappings within each other."""
KINDS = {
    "array": "a list", "object": "a mapping", "str": "text", "int": "a whole number", "float": "a number",
    "bool": "true or false", "null": "null",
}  # fmt: skip
"""What msgspec calls the types of plain values, in words."""
YAML_VALUES = 200_000
YAML_LINES = 50_000
"""Lines that are read one by one: fewer values than `YAML_VALUES`."""
DIGITS = 40
"""Digits of the longest whole number; the FLOPs of a run have 30."""


Accept = Callable[[Any], None]
"""Looks at a value before a schema does, and raises where it refuses it: a newer format has other types."""


def read_json(
    path: str | Path,
    schema: Any = Any,
    *,
    accept: Accept | None = None,
    limit: int = JSON_LIMIT,
    finite: bool = False,
) -> Any:
    """The value in a JSON file, as plain lists and dictionaries, after it was held against `schema`.

    Args:
        schema: a type that msgspec knows.
        accept: see `Accept`.
        limit: bytes that the file may have.
        finite: refuse NaN and Infinity, which Python's JSON writes and JSON does not know.

    Raises:
        Missing: there is no such file.
        Unreadable: it is no JSON, too large or too deep, repeats a key, or is not of the schema.
    """
    return _of_file(path, limit, lambda text: parse_json(text, finite=finite), accept, schema)


def read_yaml(path: str | Path, schema: Any = Any, *, accept: Accept | None = None) -> Any:
    """The value in a YAML file, as plain lists and dictionaries, after it was held against `schema`.

    Args:
        schema: a type that msgspec knows.
        accept: see `Accept`.

    Raises:
        Missing: there is no such file.
        Unreadable: as `parse_yaml`, or it is not of the schema.
    """
    return _of_file(path, YAML_LIMIT, parse_yaml, accept, schema)


def check(value: Any, schema: Any) -> Any:
    """`value`, whole, where what it holds has the types of `schema`. Keys that it does not name may be there.

    Raises:
        Unreadable: it has not; tells the place.
    """
    import msgspec

    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise Unreadable(None, _place(str(error))) from None
    return value


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """The value of a JSON text.

    Raises:
        Unreadable: it is no JSON, nested deeper than `DEPTH`, repeats a key, has a number out of range or a
            lone surrogate.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_unrepeated, parse_int=_whole_number, parse_float=_number,
            parse_constant=_refuse_constant if finite else None,
        )  # fmt: skip
    except RecursionError:
        raise Unreadable(None, f"it is nested deeper than {DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise Unreadable(
            None, f"it is no JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise Unreadable(None, f"it is not UTF-8 text ({error.reason})") from None
    _refuse_deep(value)
    escape = "\\ud" if isinstance(text, str) else b"\\ud"
    if escape in text.lower():  # type: ignore[operator]
        _refuse_surrogates(value)
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: null, booleans, numbers, text, lists, and mappings with keys of text.

    What an alias repeats is counted in full, so that a small text cannot stand for gigabytes. Tags, several
    documents, merges and repeated keys are refused. `1e-3` is a number; a date is text.

    Raises:
        Unreadable: it is no YAML, too large or too deep, or has one of these.
    """
    import yaml

    from headwise.reading.yaml_lines import build_lines
    from headwise.reading.yaml_values import build

    if len(text) > YAML_LIMIT:
        raise Unreadable(None, f"it is larger than the {YAML_LIMIT >> 20} MB that YAML may have here")
    if text.count("\n") <= YAML_LINES and (lines := build_lines(text, depth=DEPTH)) is not None:
        return lines
    try:
        return build(text, depth=DEPTH, values=YAML_VALUES)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise Unreadable(None, f"it is no YAML: {error.problem or error.context}{where}") from None
    except yaml.YAMLError as error:
        raise Unreadable(None, f"it is no YAML: {getattr(error, 'reason', None) or error}") from None
    except UnicodeError as error:
        raise Unreadable(None, f"it is no text: {error}") from None


def to_yaml(values: Any) -> str:
    """Plain values as YAML that `parse_yaml` reads back to the same, keys in their order."""
    from headwise.reading.yaml_values import dump_yaml

    return dump_yaml(values)


def _of_file(
    path: str | Path, limit: int, parse: Callable[[str], Any], accept: Accept | None, schema: Any
) -> Any:
    text = read_text(path, limit=limit)
    try:
        value = parse(text)
        if accept is not None:
            accept(value)
        return check(value, schema)
    except Unreadable as error:
        raise Unreadable(path, error.reason) from None


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Unreadable(None, f"the key {again[:80]!r} is there twice")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise Unreadable(None, f"it has a whole number of {len(digits)} digits")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise Unreadable(None, f"the number {text[:40]} is out of range")
    return value


def _refuse_constant(name: str) -> float:
    raise Unreadable(None, f"it has {name}, and numbers must be finite")


def _refuse_deep(value: Any) -> None:
    level: list[Any] = [[value]]
    for _ in range(DEPTH + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise Unreadable(None, f"it is nested deeper than {DEPTH} levels")


def _refuse_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Unreadable(None, "it has a lone surrogate, which is half of a character") from None


def _place(message: str) -> str:
    """`step: expected int, got str` of msgspec's "Expected `int`, got `str` - at `$.step`"."""
    said, _, place = message.replace("`", "").partition(" - at ")
    place = place.removeprefix("$").removeprefix(".")
    said = re.sub(r"^Object missing required field (.+)", r"the key '\1' is missing", said)
    said = said[0].lower() + said[1:]
    if found := re.fullmatch(r"expected (.+), got (\w+)", said):
        wanted = " or ".join(KINDS.get(kind, kind) for kind in found[1].split(" | "))
        said = f"expected {wanted}, got {KINDS.get(found[2], found[2])}"
    return f"{place}: {said}" if place else said
