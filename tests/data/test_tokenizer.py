"""A tokenizer instead of bytes: the same text, its exact bytes per token, once into the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from headwise.data import DataConfig, open_data
from headwise.data.tokenizer import load_tokenizer
from headwise.errors import HeadwiseError


@pytest.fixture
def text_file(tmp_path: Path, prose: str) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(prose * 3)  # more than one piece
    return path


def read(path: Path, tokenizer: Path, **values):
    config = DataConfig(name="text", path=str(path), tokenizer=str(tokenizer), seq_len=16, **values)
    return open_data(config, seed=0)


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path) -> None:
    """Its libraries would try for a minute, and say so in twenty lines."""
    (tmp_path / "text.txt").write_text("some text\n")
    command = ["data", "prepare", "text.txt", "--tokenizer", "no/where", "--out", "out"]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "headwise", *command], cwd=tmp_path, env={**os.environ, **nowhere},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("headwise: tokenizer 'no/where' cannot be loaded (")
    assert done.stderr.count("\n") == 1


def test_tokens_decode_to_the_text(text_file: Path, tokenizer_file: Path) -> None:
    from tokenizers import Tokenizer

    data = read(text_file, tokenizer_file)
    decoder = Tokenizer.from_file(str(tokenizer_file))
    text = "".join(decoder.decode(data.splits[split][0].tolist()) for split in data.splits)
    assert text == text_file.read_text()
    assert data.vocab_size == decoder.get_vocab_size()
    assert data.splits["train"].dtype == np.uint16


def test_no_piece_ends_within_a_character(tmp_path: Path, tokenizer_file: Path) -> None:
    path = tmp_path / "one_line.txt"
    path.write_text("注" * 80_000)
    data = read(path, tokenizer_file)
    assert sum(data.identity["bytes"].values()) == 240_000


def test_bytes_per_token_is_exact_and_the_validation_text_that_of_bytes(
    text_file: Path, tokenizer_file: Path
) -> None:
    data = read(text_file, tokenizer_file)
    plain = open_data(DataConfig(name="text", path=str(text_file), seq_len=16), seed=0)
    for split, part in plain.splits.items():
        assert data.identity["bytes"][split] == part.size
        assert data.bytes_per_token[split] == part.size / data.splits[split].size
    assert data.identity["text_checksum"] == plain.identity["checksum"] != data.identity["checksum"]


def test_a_text_is_tokenised_once(text_file: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = read(text_file, tokenizer_file, cache=str(cache))
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")}
    assert len(stamps) == 3
    again = read(text_file.rename(tmp_path / "renamed.txt"), tokenizer_file, cache=str(cache))
    assert again.identity["checksum"] == first.identity["checksum"]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")} == stamps
    next(iter(stamps)).write_bytes(b"cut off")
    with pytest.raises(HeadwiseError, match="is damaged; delete"):
        read(tmp_path / "renamed.txt", tokenizer_file, cache=str(cache))


def test_a_cache_is_verified_by_its_content(text_file: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    """Edited in place with the same size and time, it is refused; without a seal, made again."""
    cache = tmp_path / "cache"
    first = read(text_file, tokenizer_file, cache=str(cache))
    tokens = next(cache.rglob("train.bin"))
    right, stat = tokens.read_bytes(), tokens.stat()
    tokens.write_bytes(right[:8] + bytes([right[8] ^ 1]) + right[9:])
    os.utime(tokens, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(HeadwiseError, match=r"train\.bin is damaged; delete"):
        read(text_file, tokenizer_file, cache=str(cache))
    (tokens.parent / "checksums.json").unlink()
    again = read(text_file, tokenizer_file, cache=str(cache))
    assert tokens.read_bytes() == right
    assert again.identity == first.identity


def test_a_folder_or_a_file_is_a_tokenizer(tokenizer_file: Path) -> None:
    file, folder = load_tokenizer(str(tokenizer_file)), load_tokenizer(str(tokenizer_file.parent))
    assert file.checksum == folder.checksum
    assert file.pad_id == folder.pad_id == 0
    assert "".join(file.token(i) for i in file.encode(["head wise"])[0]) == "head wise"


def test_a_tokenizer_of_transformers_gives_the_same_ids(tokenizer_file: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from headwise.data.tokenizer import Tokenizer

    wrapped = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), pad_token="<pad>")
    fast = Tokenizer("x", wrapped.backend_tokenizer, wrapped, "<pad>")
    slow = Tokenizer("x", None, wrapped, "<pad>")
    own = load_tokenizer(str(tokenizer_file))
    texts = ["the key", "größe 注意"]
    assert own.encode(texts) == fast.encode(texts) == slow.encode(texts)
    assert own.vocab_size == slow.vocab_size == len(wrapped)


def test_truncation_of_a_saved_tokenizer_is_switched_off(tokenizer_file: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    short = Tokenizer.from_file(str(tokenizer_file))
    short.enable_truncation(4)
    short.save(str(tmp_path / "short.json"))
    assert len(load_tokenizer(str(tmp_path / "short.json")).encode(["word " * 50])[0]) > 4


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    for name, says in [
        (str(tmp_path / "broken.json"), "cannot be read"),
        (str(tmp_path / "missing.json"), "does not exist"),
        ("./nowhere", "does not exist"),
    ]:
        with pytest.raises(HeadwiseError, match=says):
            load_tokenizer(name)


def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path, tokenizer_file: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"plain " * 100 + "größe ".encode("latin-1") * 100)
    with pytest.raises(HeadwiseError, match=r"not UTF-8 .byte 0xf6 after 602 bytes"):
        read(path, tokenizer_file)


def test_a_character_cut_by_data_bytes_is_left_out(tmp_path: Path, tokenizer_file: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("注" * 2000)
    data = read(path, tokenizer_file, bytes=3001)
    assert sum(data.identity["bytes"].values()) == 3000
