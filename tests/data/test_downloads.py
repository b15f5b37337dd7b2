"""enwik8 and WikiText-103: from their homes whole and checked, or from a path."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from headwise.data import DataConfig, open_data
from headwise.data.enwik8 import enwik8
from headwise.errors import HeadwiseError


@pytest.fixture
def archive(tmp_path: Path, prose: str) -> Path:
    path = tmp_path / "home" / "enwik8.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as files:
        files.writestr("enwik8", prose)
    return path


def facts(prose: str) -> dict:
    raw = prose.encode()
    return {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def test_enwik8_is_downloaded_once(tmp_path: Path, archive: Path, prose: str) -> None:
    cache = tmp_path / "cache"
    path = enwik8(cache, archive.as_uri(), **facts(prose))
    assert path.read_text() == prose
    archive.unlink()
    assert enwik8(cache, archive.as_uri(), **facts(prose)) == path


def test_a_wrong_or_damaged_download_leaves_nothing(tmp_path: Path, archive: Path, prose: str) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(HeadwiseError, match=r"is not enwik8: .* pass --data.path=FILE"):
        enwik8(cache, archive.as_uri(), size=5, sha256="0" * 64)
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(HeadwiseError, match="damaged"):
        enwik8(cache, archive.as_uri(), **facts(prose))
    assert not (cache / "enwik8" / "enwik8").exists()
    assert not list(cache.rglob("*.zip"))


def test_no_network_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match=r"cannot be downloaded .* pass --data.path=FILE"):
        enwik8(tmp_path, "http://127.0.0.1:9/enwik8.zip")


def test_a_cached_file_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "enwik8" / "enwik8"
    path.parent.mkdir()
    path.write_bytes(b"cut off")
    with pytest.raises(HeadwiseError, match="has 7 bytes instead of 100000000"):
        enwik8(tmp_path)


def wikitext(path: Path, **values):
    return open_data(DataConfig(name="wikitext103", path=str(path), seq_len=16, **values), seed=0)


def test_wikitext_keeps_its_own_splits_and_validation_at_every_fraction(tmp_path: Path) -> None:
    for name, text in [("wiki.train.raw", "train " * 500), ("wiki.valid.raw", "valid " * 50)]:
        (tmp_path / name).write_text(text)
    (tmp_path / "wiki.test.raw").write_text("test " * 50)
    whole = wikitext(tmp_path)
    assert whole.splits["val"].tobytes() == b"valid " * 50
    assert whole.splits["test"].tobytes() == b"test " * 50
    tenth = wikitext(tmp_path, fraction=0.1)
    assert tenth.splits["train"].tobytes() == b"train " * 50
    assert tenth.splits["val"].tobytes() == whole.splits["val"].tobytes()
    assert tenth.identity["fraction"] == 0.1
    assert tenth.identity["checksum"] != whole.identity["checksum"]


def test_wikitext_reads_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, word in [("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("validation", "v")]:
        pq.write_table(pa.table({"text": [f"{word}\n", "", None] * 90}), tmp_path / f"{split}.parquet")
    pq.write_table(pa.table({"text": ["t\n"] * 90}), tmp_path / "test-00000-of-00001.parquet")
    data = wikitext(tmp_path)
    assert data.splits["train"].tobytes() == b"a\n" * 90 + b"b\n" * 90
    assert data.splits["val"].tobytes() == b"v\n" * 90
    pq.write_table(pa.table({"other": ["t"]}), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(HeadwiseError, match="has no column 'text'; it has other"):
        wikitext(tmp_path)
    (tmp_path / "validation.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(HeadwiseError, match="cannot be read as parquet"):
        wikitext(tmp_path)


def test_wikitext_of_one_file_is_cut_like_any_text(tmp_path: Path, prose: str) -> None:
    path = tmp_path / "some.txt"
    path.write_text(prose)
    assert len(wikitext(path).splits["val"][0]) == pytest.approx(0.05 * len(prose.encode()), abs=5)
    with pytest.raises(HeadwiseError, match="has no files"):
        wikitext(tmp_path / "nothing")


def test_wikitext_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(HeadwiseError, match=r'pip install "headwise\[datasets\]"'):
        open_data(DataConfig(name="wikitext103"), seed=0)
