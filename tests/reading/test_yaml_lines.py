"""What is read line by line is what the whole reader reads."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise import reading
from headwise.reading.values import DEPTH, YAML_VALUES
from headwise.reading.yaml_lines import build_lines
from headwise.reading.yaml_values import build

KEYS = st.sampled_from(
    ["a", "b", "d_model", "training.lr", "a@b", "x-y", "_", "yes", "null", "on", "N", "a b", "0x1", "é"]
)
TEXTS = st.sampled_from([
    "1", "-1", "1.5", "1e-3", "1e", "0x1f", "0o7", "007", "1_000", "1:30", "null", "~", "true", "No", "off",
    ".inf", "-.inf", ".nan", "NaN", "cosine", "a/b", "/tmp/x", "2026-11-28", "=", "a=b", "-", "--", "-x", ".",
    "...", "---", "[]", "{}", "[ ]", "", " ", "a b", "a: b", "a #b", "#b", "'1'", '"x"', "&a 1", "*a",
    "!!str 1", "|", ">", "%x", "@x", "<<", "9" * 70, "é", "a:", "?",
])  # fmt: skip
LINES = st.builds(
    lambda indent, key, gap, text: f"{' ' * indent}{key}:{gap}{text}",
    st.sampled_from([0, 0, 2, 2, 4, 1]), KEYS, st.sampled_from([" ", " ", " ", "", "  "]), TEXTS,
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False)


def same(a: object, b: object) -> bool:
    return repr(a) == repr(b)


@given(
    st.lists(LINES | st.sampled_from(["- 1", "", "  - a: 1", "# x", "a:", "  b:"]), max_size=6),
    st.sampled_from(["\n", ""]),
)
def test_lines_are_read_as_the_whole_reader_reads_them_or_not_at_all(lines: list[str], end: str) -> None:
    text = "\n".join(lines) + end
    found = build_lines(text, depth=DEPTH)
    if found is not None:
        assert same(found, build(text, depth=DEPTH, values=YAML_VALUES))


@given(st.recursive(
    SCALARS | st.sampled_from(["a", "cosine", "/x"]),
    lambda inner: st.dictionaries(st.sampled_from(["a", "b", "lr"]), inner, max_size=4), max_leaves=12,
))  # fmt: skip
def test_what_is_written_is_read(value: object) -> None:
    text = reading.to_yaml({"top": value})
    assert same(reading.parse_yaml(text), build(text, depth=DEPTH, values=YAML_VALUES))


def test_a_configuration_is_read_by_lines_and_values_are_not_shared() -> None:
    text = "model:\n  d_model: 8\n  windows: []\n  inner:\n    lr: 1.0e-3\n  x: null\nseed: 0\nlast:\n"
    first, second = build_lines(text, depth=DEPTH), build_lines(text, depth=DEPTH)
    assert (
        first
        == second
        == {
            "model": {"d_model": 8, "windows": [], "inner": {"lr": 0.001}, "x": None},
            "seed": 0,
            "last": None,
        }
    )
    assert first is not None
    first["model"]["windows"].append(1)
    assert second is not None
    assert second["model"]["windows"] == []


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2\n", "a: 1\n  b: 2\n", "  a: 1\nb: 2\n", "a:\n    b: 1\n  c: 2\n", "a: -\n"]
)
def test_what_is_no_mapping_of_lines_is_left_to_the_whole_reader(text: str) -> None:
    assert build_lines(text, depth=DEPTH) is None


def test_depth_is_bounded_as_it_is_there() -> None:
    deep = "".join(f"{' ' * level}a:\n" for level in range(DEPTH + 5))
    with pytest.raises(reading.Unreadable, match="deeper"):
        reading.parse_yaml(deep)
    assert math.isinf(reading.parse_yaml("a: .inf\n")["a"])
