"""What is in shards, and every kind of damage by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from headwise.data.inspect import Inspection, inspect_shards
from headwise.data.prepare import PrepareConfig, prepare
from headwise.data.tokenizer import load_tokenizer
from headwise.errors import HeadwiseError


@pytest.fixture
def shards(tmp_path: Path, prose: str, tokenizer_file: Path) -> Path:
    (tmp_path / "prose.txt").write_text(prose)
    out = tmp_path / "shards"
    source, tokenizer = str(tmp_path / "prose.txt"), str(tokenizer_file)
    prepare(PrepareConfig(source, tokenizer, str(out), length=16, shard_sequences=300, max_sequences=700))
    return out


def test_counts_are_those_of_all_shards_together(shards: Path, tokenizer_file: Path) -> None:
    result = inspect_shards(shards, tokenizer=load_tokenizer(str(tokenizer_file)))
    ids = np.concatenate([np.load(path)["input_ids"] for path in sorted(shards.glob("*.npz"))])
    assert result.damage == []
    assert [shard.shape for shard in result.shards] == [(300, 16), (300, 16), (100, 16)]
    assert (result.sequences, result.tokens) == (700, 700 * 16)
    counts = np.bincount(ids.ravel())
    assert result.counts.tolist() == counts[counts > 0].tolist()
    assert result.ids.tolist() == np.flatnonzero(counts).tolist()
    assert result.most_frequent(1) == [(int(counts.argmax()), int(counts.max()))]
    shares = counts[counts > 0] / counts.sum()
    assert result.entropy() == pytest.approx(-(shares * np.log(shares)).sum())
    assert str(Inspection().entropy()) == "0.0"
    first = ids[:300]
    assert result.shards[0].mean == pytest.approx(first.mean())
    assert result.shards[0].unique == len(np.unique(first))
    json.dumps(result.as_dict(5))


def test_every_damage_is_reported_and_the_rest_still_read(shards: Path, tokenizer_file: Path) -> None:
    (shards / "shard_00000.npz").write_bytes(b"cut")
    (shards / "shard_00001.npz").unlink()
    changed = np.load(shards / "shard_00002.npz")["input_ids"].copy()
    changed[0, :3] = 0
    changed[1, 0] = 9999
    np.savez(shards / "shard_00002.npz", input_ids=changed)
    np.savez(shards / "shard_00003.npz", input_ids=np.ones((2, 8), dtype=np.int32))
    result = inspect_shards(shards, tokenizer=load_tokenizer(str(tokenizer_file)))
    found = "\n".join(result.damage)
    for says in [
        "shard_00000.npz is damaged or not a shard",
        "shard_00001.npz is in the manifest, but not there",
        "shard_00002.npz has 1 ids outside the vocabulary of",
        "shard_00002.npz has 3 padding tokens (id 0)",
        "shard_00002.npz is not the file that the manifest describes",
        "shard_00003.npz has sequences of 8 tokens, shard_00002.npz of 16",
        "shard_00003.npz is not in the manifest",
    ]:
        assert says in found
    assert len(result.damage) == 7
    assert result.sequences == 102


def test_foreign_shards_need_no_manifest(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", tokens=np.arange(64, dtype=np.int64).reshape(4, 16))
    assert inspect_shards(tmp_path / "x.npz").damage == []
    (damage,) = inspect_shards(tmp_path, vocab_size=60).damage
    assert "has 4 ids outside the vocabulary of 60, up to 63" in damage


def test_a_damaged_manifest_is_damage(shards: Path) -> None:
    (shards / "manifest.json").write_text("{")
    (damage,) = inspect_shards(shards).damage
    assert "manifest.json cannot be read" in damage


def test_nothing_to_inspect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match=r"has no \.npz shards"):
        inspect_shards(tmp_path)
