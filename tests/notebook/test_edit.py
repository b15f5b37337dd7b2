"""Rewriting: only the fence's own word and the marked blocks change, on the latest text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.notebook import edit
from headwise.notebook.document import parse
from headwise.notebook.edit import Board
from headwise.notebook.naming import named

TEXT = "# T\n\n```headwise a\nheadwise train --seed 0\n```\nafter\nCompare: a vs b, x, lower\n"


def board(path: Path, said: list[str], **more: bool) -> Board:
    fences = named(parse(path.read_bytes().decode()))
    return Board(path, {name: fence.commands for name, fence in fences.items()}, said.append, **more)


def written(path: Path, text: str, result: str = "| r |", **more: bool) -> list[str]:
    said: list[str] = []
    path.write_bytes(text.encode())
    one = board(path, said, **more)
    one.state("a", "finished", "0123abcd")
    one.mark("a", result)
    one.flush(now=True)
    return said


prose = st.text(st.sampled_from("ab #|\u2028\x0b\t"), max_size=12)


@settings(max_examples=30)
@given(st.lists(prose), st.lists(prose), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_everything_else_stays_byte_for_byte(
    before: list[str], after: list[str], end: str, last: bool
) -> None:
    import tempfile

    lines = [*before, "  ````headwise:planned a", "headwise train", "````", *after]
    text = end.join(lines) + end * last
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "n.md")
        assert written(path, text) == []
        new = path.read_bytes().decode()
        mark = parse(new).mark_of("a")
        assert mark is not None
        assert not mark.edited
        kept = "".join(line for n, line in enumerate(parse(new).lines) if not mark.first <= n <= mark.last)
        wanted = text.replace("headwise:planned a", "headwise:finished/0123abcd a", 1)
        assert kept in (wanted, wanted + end)
        assert written(path, new, "other") == []
        again = path.read_bytes().decode()
        assert again.replace("other", "| r |").replace(parse(again).marks[0].sha, mark.sha) == new


def test_what_the_user_writes_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "n.md"
    path.write_text(TEXT)
    one = board(path, [])
    one.state("a", "running", "0123abcd")
    users = [TEXT.replace("after", "mine"), TEXT.replace("after", "mine and more")]
    plain = edit._written_out

    def slow(draft: Path) -> None:
        plain(draft)
        if users:
            path.write_text(users.pop(0))

    monkeypatch.setattr(edit, "_written_out", slow)  # an editor saves just before the file is replaced
    one.flush(now=True)
    assert path.read_text() == TEXT.replace("after", "mine and more").replace(
        "headwise a", "headwise:running/0123abcd a"
    )


def test_an_editor_that_still_writes_the_replaced_file_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "n.md"
    path.write_text(TEXT)
    one = board(path, [])
    one.state("a", "running", "0123abcd")
    with path.open("r+") as editor:
        plain = edit.replacing

        def late(target: Path):  # type: ignore[no-untyped-def]
            from contextlib import contextmanager

            @contextmanager
            def inner():  # type: ignore[no-untyped-def]
                with plain(target) as draft:
                    yield draft
                editor.write(TEXT.replace("after", "mine!"))
                editor.flush()

            return inner()

        monkeypatch.setattr(edit, "replacing", late)
        one.flush(now=True)
    assert "mine!" in path.read_text()
    assert "headwise:running/0123abcd a" in path.read_text()


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ("# nothing left\n", "block 'a' is no longer in n.md"),
        (TEXT.replace("headwise a", "headwise c"), "block 'a' is no longer in n.md"),
        (TEXT.replace("--seed 0", "--seed 1"), "block 'a' was changed while it ran"),
        (TEXT + "```\nhalf", "n.md could not be rewritten: line 8: a fence begins here"),
        (None, "n.md was deleted or renamed"),
    ],
)
def test_nothing_is_written_of_what_the_user_took_away(tmp_path: Path, now: str | None, reason: str) -> None:
    path = tmp_path / "n.md"
    path.write_text(TEXT)
    said: list[str] = []
    one = board(path, said)
    one.state("a", "finished", "0123abcd")
    one.mark("a", "result")
    if now is None:
        path.unlink()
    else:
        path.write_text(now)
    one.flush(now=True)
    assert (path.read_text() if path.exists() else None) == now
    assert len(said) == 1
    assert said[0].startswith(reason)


def test_a_result_that_was_edited_stays_until_it_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "n.md"
    written(path, TEXT)
    mine = path.read_text().replace("| r |", "| my number |")
    (said,) = written(path, mine, "new")
    assert said.startswith("line 6: the result of 'a' was edited by hand")
    assert path.read_text() == mine
    assert written(path, mine, "new", replace_edited=True) == []
    assert "my number" not in path.read_text()
    moved = path.read_text().replace("\n", "\r\n")
    assert not parse(moved).marks[0].edited, "line endings are not an edit"


def test_a_decision_lies_under_its_line(tmp_path: Path) -> None:
    path = tmp_path / "n.md"
    path.write_text(TEXT)
    one = board(path, [])
    (compare,) = parse(TEXT).compares
    one.mark(compare.mark, "- supported")
    one.flush(now=True)
    found = parse(path.read_text())
    assert found.marks[0].first == found.compares[0].at + 1


def test_a_notebook_of_a_thousand_blocks_is_not_rewritten_at_every_change(tmp_path: Path) -> None:
    path = tmp_path / "n.md"
    path.write_text("".join(f"```headwise b{n}\nheadwise train\n```\n\n" for n in range(1000)))
    one = board(path, [])
    inodes = set()
    for n in range(1000):
        one.state(f"b{n}", "finished", "0123abcd")
        one.flush()
        inodes.add((path.stat().st_ino, path.stat().st_mtime_ns))
    one.flush(now=True)
    assert len(inodes) < 20
    assert path.read_text().count("headwise:finished/0123abcd") == 1000
