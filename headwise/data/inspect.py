"""What is in token shards, and what is wrong with them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headwise.data.shards import read_manifest, read_shard, shard_files
from headwise.data.text import blocks
from headwise.data.tokenizer import Tokenizer
from headwise.errors import HeadwiseError


@dataclass
class ShardFacts:
    """One shard: its array `(N, S)` and the ids in it."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    min: int
    max: int
    mean: float
    std: float
    unique: int


@dataclass
class Inspection:
    """All shards of a folder, the frequencies of their tokens, and a line for each damage found."""

    shards: list[ShardFacts] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    counts: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    vocab_size: int | None = None
    manifest: dict[str, Any] | None = None

    @property
    def sequences(self) -> int:
        return sum(shard.shape[0] for shard in self.shards)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    def most_frequent(self, n: int) -> list[tuple[int, int]]:
        """The `n` most frequent ids with their counts; equal counts by id."""
        order = np.lexsort((self.ids, -self.counts))[:n]
        return [(int(self.ids[i]), int(self.counts[i])) for i in order]

    def entropy(self) -> float:
        """Entropy of the tokens' frequencies in nats: the loss of a model that knows no more."""
        shares = self.counts / max(1, self.tokens)
        return float(-(shares * np.log(shares)).sum()) + 0.0  # no -0.0

    def as_dict(self, top: int) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "unique": len(self.ids),
            "vocab_size": self.vocab_size,
            "entropy": self.entropy(),
            "shards": [asdict(shard) for shard in self.shards],
            "most_frequent": [{"id": index, "count": count} for index, count in self.most_frequent(top)],
            "sources": (self.manifest or {}).get("sources"),
            "damage": self.damage,
        }


def inspect_shards(
    path: str | Path, *, vocab_size: int | None = None, tokenizer: Tokenizer | None = None
) -> Inspection:
    """Read every shard of a folder, or one file; damage is collected, not raised.

    Against the manifest of `headwise data prepare`, where there is one, shards are checked for
    being there, and for their checksums. Memory holds one shard at a time.

    Args:
        vocab_size: ids must be below it; default the tokenizer's, else the manifest's.
        tokenizer: its padding token must not occur.

    Raises:
        HeadwiseError: there are no shards at all.
    """
    files = shard_files(path)
    result = Inspection()
    result.manifest = _manifest(files[0].parent, result.damage)
    stated = (result.manifest or {}).get("vocab_size")
    result.vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else stated)
    expected = {shard["file"]: shard for shard in (result.manifest or {}).get("shards", [])}
    for file in files:
        try:
            ids = read_shard(file)
        except HeadwiseError as error:
            result.damage.append(str(error))
            continue
        _check_ids(file, ids, result, tokenizer)
        if expected:
            _check_against(expected.get(file.name), file, result.damage)
        result.shards.append(_facts(file, ids))
        _count(ids, result)
    if Path(path).is_dir():
        missing = sorted(expected.keys() - {file.name for file in files})
        result.damage += [f"{name} is in the manifest, but not there" for name in missing]
    return result


def _manifest(folder: Path, damage: list[str]) -> dict[str, Any] | None:
    try:
        return read_manifest(folder)
    except HeadwiseError as error:
        damage.append(str(error))
        return None


def _facts(file: Path, ids: np.ndarray) -> ShardFacts:
    return ShardFacts(
        file=file.name,
        shape=ids.shape,
        dtype=str(ids.dtype),
        min=int(ids.min()),
        max=int(ids.max()),
        mean=float(ids.mean()),
        std=float(ids.std()),
        unique=len(np.unique(ids)),
    )


def _count(ids: np.ndarray, result: Inspection) -> None:
    """Add a shard's frequencies to those of the shards before it."""
    new, counts = np.unique(ids, return_counts=True)
    both, where = np.unique(np.concatenate([result.ids, new]), return_inverse=True)
    weights = np.concatenate([result.counts, counts])
    result.ids = both
    result.counts = np.bincount(where, weights=weights, minlength=len(both)).astype(np.int64)


def _check_ids(file: Path, ids: np.ndarray, result: Inspection, tokenizer: Tokenizer | None) -> None:
    if result.vocab_size is not None and ids.max() >= result.vocab_size:
        outside = int((ids >= result.vocab_size).sum())
        result.damage.append(
            f"{file} has {outside} ids outside the vocabulary of {result.vocab_size}, up to {ids.max()}"
        )
    if result.shards and ids.shape[1] != result.shards[0].shape[1]:
        first = result.shards[0]
        result.damage.append(
            f"{file} has sequences of {ids.shape[1]} tokens, {first.file} of {first.shape[1]}"
        )
    if tokenizer is not None and tokenizer.pad_id is not None:
        padded = int((ids == tokenizer.pad_id).sum())
        if padded:
            result.damage.append(f"{file} has {padded} padding tokens (id {tokenizer.pad_id})")


def _check_against(stated: dict[str, Any] | None, file: Path, damage: list[str]) -> None:
    if stated is None:
        damage.append(f"{file} is not in the manifest")
        return
    digest = hashlib.sha256()
    for block in blocks([file]):
        digest.update(block)
    if digest.hexdigest() != stated["sha256"]:
        damage.append(f"{file} is not the file that the manifest describes: its sha256 differs")
