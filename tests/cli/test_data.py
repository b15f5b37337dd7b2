"""`headwise data`: prepare, inspect, and errors in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from headwise.cli.data import main
from headwise.errors import HeadwiseError


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer with a token for each character."""
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    letters = {letter: i for i, letter in enumerate("abcdefgh ")}
    Tokenizer(models.BPE(letters, [])).save(str(path))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    records = [{"text": "abc def " * 9, "from": "wiki"}, {"text": "gh " * 20, "from": "code"}] * 5
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prepare_then_inspect(
    tmp_path: Path, tokenizer: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    command = ["prepare", str(source), "--tokenizer", str(tokenizer), "--out", str(out), "--length", "8"]
    assert main([*command, "--source-field", "from", "--keep", "wiki", "C4"]) == 0
    printed = capsys.readouterr()
    assert "wiki: 5 documents, 45 sequences" in printed.out
    assert "code: 5 documents, dropped" in printed.out
    assert "45 sequences of 8 tokens in 1 shards, checked" in printed.out
    assert "no document has the source C4" in printed.err

    assert main(["inspect", str(out), "--tokenizer", str(tokenizer)]) == 0
    printed = capsys.readouterr()
    assert "45 x 8" in printed.out
    assert "25.00%" in printed.out  # the space
    assert re.search(r"different ids, entropy of their frequencies \d\.\d{3} nats\n", printed.out)
    assert main(["inspect", str(out), "--json", "--top", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["most_frequent"] == [{"id": 8, "count": 90}]
    assert facts["sources"]["wiki"]["sequences"] == 45
    assert facts["vocab_size"] == 9


def test_damage_is_shown_and_is_an_error(
    tmp_path: Path, tokenizer: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    main(
        [
            "prepare",
            str(source),
            "--tokenizer",
            str(tokenizer),
            "--out",
            str(out),
            "--keep",
            "all",
            "--length",
            "8",
        ]
    )
    shard = out / "shard_00000.npz"
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(HeadwiseError, match=r"damage in .*shard_00000\.npz is damaged"):
        main(["inspect", str(out)])
    assert "damage: " in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["prepare"], ["inspect", "x", "--top", "many"], ["unpack"]])
def test_a_wrong_command_line_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: headwise data" in capsys.readouterr().err
