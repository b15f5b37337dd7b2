"""Text from files, folders and the standard library: what is read, what it is called, what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.data import DataConfig, open_data
from headwise.data.stdlib import source_files, standard_library
from headwise.data.text import split_90_5_5
from headwise.errors import HeadwiseError


def read(path: Path, seq_len: int = 16, **values):
    return open_data(DataConfig(name="text", path=str(path), seq_len=seq_len, **values), seed=0)


@given(st.text(max_size=300))
def test_splits_are_contiguous_and_cut_between_characters(text: str) -> None:
    whole = np.frombuffer(text.encode(), dtype=np.uint8)
    splits = split_90_5_5(whole)
    assert "".join(part.tobytes().decode() for part in splits.values()) == text
    for split, share in (("train", 0.9), ("val", 0.05), ("test", 0.05)):
        assert abs(len(splits[split]) - share * len(whole)) <= 5


def test_a_file_is_mapped_not_copied(tmp_path: Path, prose: str) -> None:
    path = tmp_path / "prose.txt"
    path.write_text(prose)
    data = read(path)
    assert isinstance(data.splits["train"].base, np.memmap)
    assert data.vocab_size == 256
    assert data.bytes_per_token == {"train": 1.0, "val": 1.0, "test": 1.0}
    assert data.identity["checksum"] == hashlib.sha256(prose.encode()).hexdigest()
    assert sum(data.identity["bytes"].values()) == len(prose.encode())
    first = data.splits["train"][0, :100].tobytes().decode(errors="ignore")
    assert prose.startswith(first)


def test_bytes_takes_at_most_the_first_n(tmp_path: Path, prose: str) -> None:
    path = tmp_path / "prose.txt"
    path.write_text(prose)
    part = read(path, bytes=5000)
    assert sum(part.identity["bytes"].values()) == 5000
    assert part.identity["checksum"] == hashlib.sha256(prose.encode()[:5000]).hexdigest()
    whole = read(path)
    assert read(path, bytes=10**9).identity == whole.identity
    assert part.identity["checksum"] != whole.identity["checksum"]


def test_a_given_enwik8_is_a_text_of_that_name(tmp_path: Path, prose: str) -> None:
    path = tmp_path / "enwik8.head"
    path.write_text(prose)
    config = DataConfig(name="enwik8", path=str(path), bytes=10_000_000, seq_len=16)
    data = open_data(config, seed=0)
    assert data.identity["name"] == "enwik8"
    assert data.identity["checksum"] == read(path).identity["checksum"]


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    for name, content in [("b/x.txt", b"bbb " * 99), ("a.md", b"aaa " * 99), ("c.py", b"ccc " * 99)]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_bytes(b"not this")
    data = read(tmp_path)
    whole = b"".join(part.tobytes() for part in data.splits.values())
    assert whole == b"aaa " * 99 + b"bbb " * 99 + b"ccc " * 99
    assert data.identity["files"] == 3
    assert data.identity["files_skipped"] == 1
    again = read(tmp_path)
    assert again.identity == data.identity
    (tmp_path / "a.md").rename(tmp_path / "z.md")
    assert read(tmp_path).identity["checksum"] != data.identity["checksum"]


def test_the_seed_does_not_change_what_the_data_is(tmp_path: Path, prose: str) -> None:
    path = tmp_path / "prose.txt"
    path.write_text(prose)
    config = DataConfig(name="text", path=str(path), seq_len=16)
    assert open_data(config, seed=1).identity == open_data(config, seed=2).identity


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "short.txt").write_text("short " * 40)
    (tmp_path / "folder").mkdir()
    for name, says in [
        ("missing.txt", "does not exist"),
        ("empty.txt", "is empty"),
        ("binary.bin", "is not text"),
        ("folder", "without text files"),
        ("short.txt", "data.seq_len=16 is longer than the val split of data.name=text, which has 12 tokens"),
    ]:
        with pytest.raises(HeadwiseError, match=says):
            read(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that no one can read")
def test_an_unreadable_file_is_refused() -> None:
    with pytest.raises(HeadwiseError, match=r"/proc/self/mem cannot be read: Input/output error"):
        read(Path("/proc/self/mem"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("word " * 999)
    (tmp_path / "file").touch()
    with pytest.raises(HeadwiseError, match=r"cannot be written .* set data.cache"):
        read(tmp_path / "texts", cache=str(tmp_path / "file" / "cache"))


def test_the_standard_library_is_sources_without_tests() -> None:
    import sysconfig

    data = open_data(DataConfig(), seed=0)
    names = source_files(Path(sysconfig.get_path("stdlib")))
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert data.identity["files"] == len(names)
    assert len(data.identity["files_checksum"]) == len(data.identity["checksum"]) == 64
    assert data.identity["python"].startswith("3.")
    assert sum(data.identity["bytes"].values()) > 5_000_000


def test_the_standard_library_leaves_out_what_differs_between_machines(tmp_path: Path) -> None:
    for name in [
        "os.py", "email/parser.py", "_sysconfigdata__linux.py", "sitecustomize.py", "tkinter/a.py",
        "site-packages/numpy.py", "config-3.11-x/python-config.py", "unittest/test/a.py", "notes.txt",
    ]:  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    whole, facts = standard_library(tmp_path)
    assert whole.tobytes() == b"email/parser.pyos.py"
    assert facts["files"] == 2
    with pytest.raises(HeadwiseError, match=r"has no \.py files"):
        standard_library(tmp_path / "config-3.11-x" / "nothing")
