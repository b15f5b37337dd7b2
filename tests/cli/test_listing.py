"""A table in a narrow terminal: numbers are whole or named as left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.cli.listing import Column, plain, table


def columns(cells: list[list[str]]) -> list[Column]:
    run, state, loss, params, reason = (list(column) for column in zip(*cells, strict=True))
    return [
        Column("run", run, wraps=12),
        Column("state", state, colours={"failed": "red"}),
        Column("val loss", loss, number=True),
        Column("params", params, number=True, leaves=0),
        Column("reason", reason, wraps=16),
    ]


ROWS = [
    ["demo/selective@lr_0.001/seed_0", "finished", "3.9692", "3,403,008", ""],
    [
        "demo/flash/seed_0",
        "failed",
        "",
        "115,008",
        "unreadable summary.json: it is missing although the run finished",
    ],
]


@pytest.mark.parametrize("width", [200, 120, 80, 60, 50])
def test_numbers_are_whole_at_any_width(width: int) -> None:
    lines, left_out = table(columns(ROWS), width)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "3.9692" in text
    assert ("3,403,008" in text) == ("params" not in left_out)
    assert left_out in ([], ["params"])
    joined = "".join(lines).replace(" ", "")
    assert "3,403,00" not in joined or "3,403,008" in joined


def test_a_file_has_no_width() -> None:
    lines, left_out = table(columns(ROWS), None)
    assert len(lines) == 3
    assert not left_out
    assert lines[2].endswith(ROWS[1][-1])


@given(
    st.lists(st.tuples(st.text("ab/_é漢", max_size=40), st.floats(0, 1e9)), min_size=1, max_size=5),
    st.integers(50, 120),
)
def test_every_character_and_number_is_there(rows: list[tuple[str, float]], width: int) -> None:
    from rich.cells import cell_len

    cells = [[name, "finished", f"{number:.4f}", f"{number:,.0f}", ""] for name, number in rows]
    lines, _ = table(columns(cells), width)
    assert all(cell_len(line) <= width for line in lines)
    text = "".join("".join(lines[1:]).split())
    for name, number in rows:
        assert f"{number:.4f}" in "\n".join(lines)
        assert all(text.count(letter) >= name.count(letter) for letter in "b/_é漢")


def test_colour_changes_no_width() -> None:
    lines, _ = table(columns(ROWS), 120, colour=True)
    assert any("\x1b[31mfailed" in line for line in lines)


def test_a_name_cannot_act_on_the_terminal() -> None:
    assert plain("a\x1b[2Jb\nc") == "a\\x1b[2Jb c"
