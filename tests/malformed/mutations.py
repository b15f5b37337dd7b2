"""Ways in which a file goes wrong, drawn from a valid one: types, keys, bytes, depth, numbers."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from typing import Any

import yaml
from hypothesis import strategies as st

JUNK = st.sampled_from([
    None, True, -1, 0, 2, 10**30, -(2**63), 1e308, math.nan, math.inf, -math.inf, 0.5, "", "x", "1", "\0",
    "é\n", [], {}, [None], [[1]], {"a": 1}, ["x", 1], "../../x", "x" * 3000,
])  # fmt: skip
TEXTS = st.sampled_from([
    b"", b"null", b"[]", b"{}", b"1", b'"x"', b"\0" * 9, b"\xff\xfe\x00\x01", b"[" * 100_000,
    b'{"a":' * 100_000, b'{"a": 1, "a": 2}', b"9" * 10_000, b"NaN", b"a: &a [*a]", b"- - - x", b"a,b\n1\n",
    b"PAR1PAR1", b"PK\x05\x06" + b"\0" * 18, b"\x93NUMPY\x01\x00\xff\xff", b"\xff" * 8 + b"{}",
    b"a: !!python/name:os.system", b"x\n" * 9,
])  # fmt: skip


@st.composite
def of_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut short, altered, doubled, or something else altogether."""
    way = draw(st.sampled_from(["cut", "flip", "doubled", "other", "insert"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if way == "cut":
        return content[:place]
    if way == "flip":
        return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    if way == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:]
    return content + content if way == "doubled" else draw(TEXTS)


@st.composite
def of_value(draw: st.DrawFn, value: Any) -> Any:
    """The same value with one place in it changed, taken away, or wrapped."""
    value = copy.deepcopy(value)
    holder, key = draw(st.sampled_from(list(places(value)) or [(None, None)]))
    if holder is None:
        return draw(JUNK)
    if isinstance(holder, dict) and draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = draw(JUNK)
    return value


def places(value: Any) -> Any:
    """Every (container, key) of a nested value; of long lists the first few."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    )
    for key, inner in items:
        yield value, key
        yield from places(inner)


@st.composite
def of_table(draw: st.DrawFn, content: bytes) -> bytes:
    """A CSV file with one cell or one name changed, or a column less."""
    rows = list(csv.reader(io.StringIO(content.decode())))
    row, column = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, len(rows[0]) - 1))
    if draw(st.booleans()):
        rows[row][column] = draw(
            st.sampled_from(["", "x", "nan", "inf", "-1", "1e400", "9" * 40, "0.5", "²"])
        )
    else:
        rows = [
            cells[:column] + cells[column + 1 :] for cells in rows[: draw(st.sampled_from([1, len(rows)]))]
        ]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def of_file(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    """What may become of a file of this name."""
    if name.endswith(".json"):
        return of_bytes(content) | of_value(json.loads(content)).map(lambda value: json.dumps(value).encode())
    if name.endswith(".yaml"):
        return of_bytes(content) | of_value(yaml.safe_load(content)).map(
            lambda value: yaml.safe_dump(value).encode()
        )
    return of_bytes(content) | of_table(content) if name.endswith(".csv") else of_bytes(content)
