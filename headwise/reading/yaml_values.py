"""Plain values out of YAML, event by event: nothing is expanded, and nothing but plain values is made."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from headwise.reading.opening import Unreadable

LONGEST_NUMBER = 64
"""Characters of the longest number; to read one takes time with the square of its length."""

FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
"""As YAML 1.2 and people write numbers: 1e-3 is one, and 1:30.5 is not."""


def build(text: str, *, depth: int, values: int) -> Any:
    """The one value of a YAML text; None where it is empty.

    Args:
        depth: lists and mappings that may lie within each other.
        values: scalars that may be there, keys included.

    Raises:
        Unreadable: something that `parse_yaml` refuses.
        yaml.YAMLError: it is no YAML.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        return _Builder(depth, values).take(loader)
    finally:
        loader.dispose()


@dataclass
class _Open:
    """A list or a mapping whose end has not come yet.

    Attributes:
        key: waits for its value.
        anchor: the name that it can be repeated by.
        size, height: values inside, and levels.
    """

    value: list[Any] | dict[str, Any]
    anchor: str | None
    key: str | None = None
    size: int = 1
    height: int = 1

    @property
    def awaits_key(self) -> bool:
        return isinstance(self.value, dict) and self.key is None


class _Builder:
    def __init__(self, depth: int, values: int) -> None:
        self.depth, self.room = depth, values
        self.open: list[_Open] = []
        self.anchors: dict[str, tuple[Any, int, int]] = {}
        self.result: Any = None
        self.documents = 0

    def take(self, loader: Any) -> Any:
        while loader.check_event():
            event = loader.get_event()
            line = event.start_mark.line + 1
            if getattr(event, "tag", None):
                raise Unreadable(
                    None, f"line {line} has the tag {event.tag[:80]}, and tags are not read here"
                )
            match event:
                case yaml.DocumentStartEvent():
                    self.documents += 1
                    if self.documents > 1:
                        raise Unreadable(None, f"line {line} starts a second document; keep one")
                case yaml.AliasEvent():
                    self._alias(event, line)
                case yaml.ScalarEvent():
                    self._scalar(event, line)
                case yaml.SequenceStartEvent():
                    self._start(_Open([], event.anchor), line)
                case yaml.MappingStartEvent():
                    self._start(_Open({}, event.anchor), line)
                case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                    done = self.open.pop()
                    self._add(done.value, done.size, done.height, done.anchor)
        return self.result

    def _start(self, container: _Open, line: int) -> None:
        self._refuse_key(line)
        if len(self.open) >= self.depth:
            raise Unreadable(None, f"line {line} is nested deeper than {self.depth} levels")
        self._count(1, line)
        self.open.append(container)

    def _alias(self, event: Any, line: int) -> None:
        """What an anchor named before, once more, counted in full."""
        self._refuse_key(line)
        if event.anchor not in self.anchors:  # or it is inside of what it names
            raise Unreadable(
                None, f"line {line} repeats *{event.anchor[:80]}, which is not complete before it"
            )
        value, size, height = self.anchors[event.anchor]
        self._count(size, line)
        if len(self.open) + height > self.depth:
            raise Unreadable(None, f"line {line} is nested deeper than {self.depth} levels")
        self._add(copy.deepcopy(value), size, height, None)

    def _scalar(self, event: Any, line: int) -> None:
        self._count(1, line)
        value = plain(event.value, line) if event.implicit[0] else event.value
        if not self.open or not self.open[-1].awaits_key:
            self._add(value, 1, 0, event.anchor)
            return
        if not isinstance(value, str):
            raise Unreadable(None, f"line {line}: the key {event.value[:80]} is not text; write it in quotes")
        if value == "<<" and event.implicit[0]:
            raise Unreadable(None, f"line {line} merges mappings (<<), which is not read here")
        if value in self.open[-1].value:
            raise Unreadable(None, f"line {line}: the key {value[:80]!r} is there twice")
        self.open[-1].key = value

    def _refuse_key(self, line: int) -> None:
        if self.open and self.open[-1].awaits_key:
            raise Unreadable(
                None, f"line {line} has a key that is a list, a mapping or an alias; keys are text"
            )

    def _add(self, value: Any, size: int, height: int, anchor: str | None) -> None:
        if anchor is not None:
            self.anchors[anchor] = value, size, height
        if not self.open:
            self.result = value
            return
        around = self.open[-1]
        around.size += size
        around.height = max(around.height, height + 1)
        if isinstance(around.value, list):
            around.value.append(value)
        else:
            assert around.key is not None
            around.value[around.key] = value
            around.key = None

    def _count(self, size: int, line: int) -> None:
        self.room -= size
        if self.room < 0:
            raise Unreadable(
                None, f"it holds more values than a configuration has, counted up to line {line}"
            )


def plain(text: str, line: int) -> Any:
    """What a scalar without quotes stands for."""
    if FLOAT.fullmatch(text):
        return _number(text, "float", line)
    kind = _resolver().resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
    match kind:
        case "null":
            return None
        case "bool":
            return yaml.SafeLoader.bool_values[text.lower()]
        case "int" if ":" not in text:  # 1:30 would be 90
            return _number(text, "int", line)
    return text  # also what is a date, or a time in base 60, elsewhere


def _number(text: str, kind: str, line: int) -> int | float:
    if len(text) > LONGEST_NUMBER:
        raise Unreadable(None, f"line {line} has a number of {len(text)} characters")
    node = yaml.ScalarNode(f"tag:yaml.org,2002:{kind}", text)
    construct = yaml.constructor.SafeConstructor()
    try:
        return construct.construct_yaml_int(node) if kind == "int" else construct.construct_yaml_float(node)
    except ValueError:  # 0_ or 0b_, which look like numbers
        raise Unreadable(None, f"line {line}: {text[:40]} is not a number") from None


@cache
def _resolver() -> Any:
    return yaml.resolver.Resolver()


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `build` would read as a number, and writes what is there twice out twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"(?:{FLOAT.pattern})\\Z"), list("-+0123456789.")
)


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that `build` reads back to the same, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
