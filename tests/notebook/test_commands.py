"""The command lines of a fence: what a shell would read the same way, and nothing that only it would do."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.cli.main import VERBS as ALL
from headwise.errors import HeadwiseError
from headwise.notebook.commands import VERBS, read_commands


def test_continued_lines_comments_and_quotes_are_read() -> None:
    body = (
        "# a comment\r\nheadwise train --config 'a b.yaml' \\\r\n  --seed=3  # more\r\n\r\n"
        'headwise study "x\\"y.yaml" --axes.data.seq_len=[512,1024] --note=a#b\r\n'
    )
    first, second = read_commands(body, 10)
    assert (first.line, first.verb, first.words) == (11, "train", ("--config", "a b.yaml", "--seed=3"))
    assert second.line == 14
    assert second.words == ('x"y.yaml', "--axes.data.seq_len=[512,1024]", "--note=a#b")
    assert first.value("--seed") == "3"
    assert first.value("--config") == "a b.yaml"
    assert first.without("--config") == ("--seed=3",)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("headwise train | tee log", "a pipe"),
        ("headwise train > log.txt", "a redirection"),
        ("headwise train 2>&1", "a redirection"),
        ("headwise train; rm -rf x", "a separator of commands"),
        ("headwise train && headwise train", "a shell operator"),
        ("headwise train &", "a shell operator"),
        ("headwise train --seed $(date)", "a shell variable"),
        ("headwise train --out $HOME/x", "a shell variable"),
        ('headwise train --out "$HOME/x"', "a shell variable"),
        ("headwise train `date`", "a command substitution"),
        ("headwise report runs/*", "a shell pattern"),
        ("(headwise train)", "a subshell"),
        ("headwise train --out 'x", "is not closed"),
        ("headwise train \\  \n  --seed 1", "spaces after the backslash"),
        ("rm -rf runs", "the command is 'rm'"),
        ("SEED=1 headwise train", "the command is 'SEED=1'"),
        ("python -m headwise.cli.main train", "the command is 'python'"),
        ("headwise", "has no verb"),
        ("headwise tran", "did you mean 'train'"),
        ("headwise notebook run x.md", "does not run the verb"),
        ("headwise runs", "does not run the verb"),
        ("headwise train --resume", "resumes its runs by itself"),
        ("headwise study a.yaml --plan", "it runs nothing"),
    ],
)
def test_anything_else_is_refused_with_its_line(line: str, reason: str) -> None:
    with pytest.raises(HeadwiseError, match=r"^line 8: ") as error:
        read_commands(f"headwise train --seed 1\n{line}\n", 7)
    assert reason in str(error.value)


@given(st.lists(st.text(st.characters(exclude_categories=["C"]), min_size=1), max_size=5))
def test_quoted_words_come_back(words: list[str]) -> None:
    refused = ("--resume", "--eval_only", "--eval-only", "--plan", "--help", "-h")
    words = [word for word in words if word.partition("=")[0] not in refused]
    (command,) = read_commands(f"headwise report {shlex.join(words)}", 1)
    assert command.words == tuple(words)


def test_every_verb_exists() -> None:
    assert set(VERBS) <= set(ALL)
