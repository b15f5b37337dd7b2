"""The parts of a notebook's text, and what is refused with its line."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from headwise.errors import HeadwiseError
from headwise.notebook.document import Document, parse
from headwise.notebook.naming import named

TRAIN = "headwise train --seed 0"


def block(name: str = "a", info: str = "headwise", ticks: str = "```") -> str:
    return f"{ticks}{info} {name}\n{TRAIN}\n{ticks}\n"


def test_fences_of_every_form_are_found() -> None:
    text = (
        f"# T\n\n{block('a')}\n{block('b', 'headwise:running/0123abcd', '````')}"
        f"~~~ headwise:failed/x c d\n{TRAIN}\n~~~~  \n```python\n```` headwise no\n```\n"
    )
    fences = parse(text.replace("\n", "\r\n")).fences
    assert [(f.given, f.state, f.id, f.line) for f in fences] == [
        ("a", "planned", "", 3), ("b", "running", "0123abcd", 7), ("c d", "failed", "x", 10),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "hidden",
    [
        f"````\n{block()}````\n",
        f"<!--\n{block()}-->\n",
        f"<!-- headwise:result x 0123456789abcdef -->\n{block()}<!-- /headwise:result -->\n",
        f"<pre>\n{block()}</pre>\n",
        block(info="headwise-log"),
        "`headwise` fences begin with ```headwise\n",
    ],
)
def test_a_fence_that_is_shown_is_not_a_block(hidden: str) -> None:
    assert parse(f"text\n\n{hidden}\ntext\n").fences == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"x\n\n```headwise a\n{TRAIN}\n", "line 3: a fence begins here and is not closed"),
        ("```python\nx\n", "line 1: a fence begins here"),
        (f"~~~headwise a\n{TRAIN}\n```\n", "line 1: a fence begins here"),
        ("<!-- x\n", "line 1: a comment begins here"),
        (f"- x\n\n    ```headwise a\n    {TRAIN}\n    ```\n", "line 3: a headwise fence in a list"),
        (f"> ```headwise a\n> {TRAIN}\n> ```\n", "line 1: a headwise fence in a list, in a quotation"),
        ("```headwise:done a\nheadwise train\n```\n", "line 1: state 'done' is not known"),
        ("```headwise a/b\nheadwise train\n```\n", "line 1: block 'a/b' cannot name a folder"),
        ("```headwise a--b\nheadwise train\n```\n", "line 1: block 'a--b' has '--' in its name"),
        ("```headwise a\n# nothing\n```\n", "line 1: the fence has no command"),
        ("```headwise a\n\nls\n```\n", "line 3: the command is 'ls'"),
        ("Compare: a and b\n", "line 1: 'a and b' is not `A vs B"),
        ("Compare: a vs b, val_loss, better\n", "line 1: direction 'better' is not known"),
        ("Compare: a vs b, val_loss, equal\n", "line 1: no interval can show"),
        ("Compare: a vs a, val_loss, lower\n", "line 1: 'a' is compared with itself"),
        ("Compare: a vs b, val_loss, lower, at least x\n", "line 1: smallest_difference is 'x'"),
        ("Compare: a vs b, x, lower\n\nCompare: a vs  b, x, lower.\n", "line 3: the comparison"),
        ("<!-- headwise:result a 0123456789abcdef -->\n", "line 1: the result of 'a' begins here"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(text: str, reason: str) -> None:
    with pytest.raises(HeadwiseError) as error:
        parse(text)
    assert str(error.value).startswith(reason)


def test_hypotheses_belong_to_the_next_fence_and_comparisons_to_their_section() -> None:
    text = (
        f"T\n=\nHypothesis: one\ntwo\n\n**Hypothesis:** three\n{block('a')}\n## S\n\n{block('b')}"
        "- Compare: `a` vs b, val_loss, lower, at least 0.5%\nand more\n"
    )
    found = parse(text)
    assert [found.hypothesis_of(fence) for fence in found.fences] == ["one\ntwo\n\nthree", ""]
    (compare,) = found.compares
    assert (compare.text, compare.section) == ("a vs b, val_loss, lower, at least 0.5%", "S (line 11)")
    assert found.title == "T"


def names(text: str) -> dict[str, int]:
    return {name: fence.line for name, fence in named(parse(text)).items()}


def test_names_come_from_the_fence_the_folder_or_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text("name: mine\n")
    text = "```headwise\nheadwise train --out runs/x/wide\n```\n"
    text += "```headwise\nheadwise study --workers 2 s.yaml\n```\n"
    assert names(text) == {"wide": 1, "mine": 4}
    for wrong, reason in (
        (block() + block(), "the blocks in lines 1 and 4 are both called 'a'"),
        (block("a") + block("A"), "blocks 'a' and 'A' would share the folder"),
        (block(""), "line 1: the block has no name"),
        ("```headwise\nheadwise study\n```\n", "line 2: `headwise study` names no study file"),
    ):
        with pytest.raises(HeadwiseError) as error:
            names(wrong)
        assert str(error.value).startswith(reason)


def test_any_text_is_read_or_refused_and_comes_back_byte_for_byte() -> None:
    text = "\ufeff```headwise a\r\nheadwise train\r```\n\x0b\u2028x\r\n"
    found = parse(text)
    assert isinstance(found, Document)
    assert "".join(found.lines) == text
    assert found.fences[0].word == (4, 12)


@pytest.mark.parametrize(
    "text",
    ["Compare: " + "a vs b, " * 20_000, ">" * 20_000 + "x", "> " * 20_000, "Compare: " + "a vs " * 20_000],
)
def test_long_lines_take_no_time(text: str) -> None:
    began = time.process_time()
    with contextlib.suppress(HeadwiseError):
        parse(text)
    assert time.process_time() - began < 1


def test_what_the_user_wrote_is_all_but_states_and_results() -> None:
    before = "# T\n\n```headwise a\nheadwise train\n```"
    after = (
        "# T\n\n```headwise:finished/0123abcd a\nheadwise train\n```\n"
        "<!-- headwise:result a 01234567 -->\nx\n<!-- /headwise:result -->\n"
    )
    assert parse(before.replace("headwise a", "headwise:planned a")).own == parse(after).own
    assert parse(after.replace("train", "train --seed 1")).own != parse(after).own
    assert parse(after.replace("# T", "# U")).own != parse(after).own
