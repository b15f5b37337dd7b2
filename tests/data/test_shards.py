"""Token shards: what is accepted, what is refused, and that rows stay apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from headwise.data import IGNORE, DataConfig, eval_batches, open_data
from headwise.data.shards import read_shard
from headwise.errors import HeadwiseError


def write(folder: Path, *sizes: int, width: int = 32, key: str = "input_ids") -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, 500, (sum(sizes), width), dtype=np.int32)
    for i, part in enumerate(np.split(ids, np.cumsum(sizes)[:-1])):
        np.savez(folder / f"shard_{i:03}.npz", **{key: part})
    return ids


def read(path: Path, seq_len: int = 32, **values):
    return open_data(DataConfig(name="shards", path=str(path), seq_len=seq_len, **values), seed=0)


@pytest.mark.parametrize("key", ["input_ids", "tokens", "ids", "arr_0", "whatever"])
def test_shards_are_one_list_of_sequences_cut_90_5_5(tmp_path: Path, key: str) -> None:
    ids = write(tmp_path, 30, 50, 20, key=key)
    data = read(tmp_path)
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [90, 5, 5]
    assert (np.concatenate(list(data.splits.values())) == ids).all()
    assert isinstance(data.splits["val"], np.memmap)
    assert data.vocab_size == ids.max() + 1
    assert data.bytes_per_token is None


def test_nothing_is_predicted_from_a_foreign_sequence(tmp_path: Path) -> None:
    ids = write(tmp_path, 40)
    ((inputs, targets),) = eval_batches(read(tmp_path), "val", 8)
    assert (inputs.numpy() == ids[36:38]).all()
    assert (targets[:, :-1].numpy() == ids[36:38, 1:]).all()
    assert (targets[:, -1] == IGNORE).all()
    shorter = read(tmp_path, seq_len=7)
    assert sum(batch.counted for batch in eval_batches(shorter, "val", 8)) == 2 * 31


def test_checksums_and_ids_tell_shards_apart(tmp_path: Path) -> None:
    write(tmp_path, 10, 10)
    before = read(tmp_path).identity
    assert read(tmp_path).identity == before
    np.savez(tmp_path / "shard_001.npz", input_ids=np.zeros((10, 32), dtype=np.int32))
    assert read(tmp_path).identity["checksum"] != before["checksum"]


def test_the_vocabulary_is_given_or_stated_or_seen(tmp_path: Path) -> None:
    ids = write(tmp_path, 20)
    assert read(tmp_path, vocab_size=50_257).vocab_size == 50_257
    (tmp_path / "manifest.json").write_text(json.dumps({"vocab_size": 32_000}))
    assert read(tmp_path).vocab_size == 32_000
    with pytest.raises(HeadwiseError, match=f"have the id {ids.max()}, outside a vocabulary of 100"):
        read(tmp_path, vocab_size=100)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(HeadwiseError, match=r"manifest\.json cannot be read"):
        read(tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    write(good, 20)
    raw = (good / "shard_000.npz").read_bytes()
    middle = len(raw) // 2
    flipped = raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :]
    for name, content in [("cut", raw[:-100]), ("flipped", flipped), ("other", b"text"), ("empty", b"")]:
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(HeadwiseError, match=f"{name}.npz is damaged or not a shard"):
            read_shard(path)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"input_ids": np.zeros((4, 8))}, "no 2-D integer array"),
        ({"input_ids": np.zeros(8, dtype=int)}, "no 2-D integer array"),
        ({"a": np.zeros((4, 8), dtype=int), "b": np.zeros((4, 8), dtype=int)}, "it holds a, b"),
        ({"input_ids": np.full((4, 8), -1)}, "has the id -1"),
        ({"input_ids": np.full((4, 8), 2**40)}, "has the id 1099511627776; ids are whole numbers from 0 to"),
        ({"input_ids": np.zeros((0, 8), dtype=int)}, "has no sequences"),
        ({"input_ids": np.array([[{}]], dtype=object)}, "no 2-D integer array"),
    ],
)
def test_arrays_that_are_no_tokens_are_refused(tmp_path: Path, arrays: dict, says: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(HeadwiseError, match=says):
        read_shard(tmp_path / "x.npz")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    np.savez(tmp_path / "x.npz", input_ids=np.array([[Trap()]], dtype=object))
    with pytest.raises(HeadwiseError):
        read_shard(tmp_path / "x.npz")
    assert not (tmp_path / "sprung").exists()


def test_a_mask_beside_the_ids_is_no_obstacle(tmp_path: Path) -> None:
    ids = np.arange(96, dtype=np.int32).reshape(3, 32)
    np.savez(tmp_path / "x.npz", attention_mask=np.ones_like(ids), input_ids=ids)
    assert (read_shard(tmp_path / "x.npz") == ids).all()


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match="do not exist"):
        read(tmp_path / "missing")
    with pytest.raises(HeadwiseError, match=r"has no \.npz shards"):
        read(tmp_path)
    write(tmp_path, 2)
    with pytest.raises(HeadwiseError, match="have 2 sequences"):
        read(tmp_path)
    write(tmp_path, 20)
    with pytest.raises(HeadwiseError, match=r"data\.seq_len=64 is longer"):
        read(tmp_path, seq_len=64)
    np.savez(tmp_path / "shard_001.npz", input_ids=np.zeros((3, 16), dtype=np.int32))
    with pytest.raises(HeadwiseError, match=r"sequences of 16 tokens, shard_000\.npz of 32"):
        read(tmp_path)
