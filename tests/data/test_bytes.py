"""Shards of bytes: what a text says, as it stands on disk, and a run that counts bits per byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headwise.data.config import DataConfig
from headwise.data.prepare import PrepareConfig, prepare
from headwise.data.sources import open_data
from headwise.data.tokenizer import load_tokenizer
from headwise.errors import HeadwiseError

TEXT = "int main(void) { return 'ä'; }\n" * 40


def test_bytes_are_their_own_tokens() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(["aä"]) == [[97, 195, 164]]
    assert tokenizer.decode([97, 195, 164]) == "aä"
    assert tokenizer.vocab_size == 256
    assert tokenizer.pad_id is None


def test_files_that_fit_a_pattern_become_shards_of_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.c", "b.c", "c.c", "notes.txt"):
        (source / name).write_text(TEXT if name.endswith(".c") else "no code")
    out = tmp_path / "shards"
    manifest = prepare(PrepareConfig(str(source), "bytes", str(out), keep=("all",), length=65, pattern="*.c"))
    whole = len(TEXT.encode()) // 65
    assert manifest["sequences"] == 3 * whole
    first = np.load(out / "shard_00000.npz", allow_pickle=False)["input_ids"]
    assert bytes(first[0].tolist()).decode() == TEXT.encode()[:65].decode()

    config = DataConfig(
        name="shards", path=str(out), tokenizer="bytes", seq_len=64, cache=str(tmp_path / "cache")
    )
    data = open_data(config, seed=0)
    assert data.vocab_size == 256
    assert data.bytes_per_token == {"train": 1.0, "val": 1.0, "test": 1.0}


def test_a_pattern_that_nothing_fits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(HeadwiseError, match=r"no files that fit '\*\.c'"):
        prepare(PrepareConfig(str(tmp_path), "bytes", str(tmp_path / "out"), keep=("all",), pattern="*.c"))
