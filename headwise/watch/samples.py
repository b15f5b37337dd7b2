"""What a profile reads: contexts of exactly T tokens, non-overlapping, none padded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.data.config import TEXT, DataConfig
from headwise.errors import HeadwiseError
from headwise.files import local
from headwise.watch.load import Loaded

RECORDS = (".jsonl", ".json", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Source:
    """Where a profile's tokens come from.

    Attributes:
        data: an `.npz` shard or a folder of them; a jsonl or Parquet file; a text file or folder; one of
            headwise's own corpora (pystdlib, enwik8, wikitext103); or a Hugging Face dataset's name.
            None means the validation data of a headwise run.
        tokenizer: for text; default the model's own (bytes for a headwise run that read bytes).
        text_field: where a record of jsonl, Parquet or a dataset keeps its text.
        split, dataset_config, streaming: of a Hugging Face dataset.
        cache: folder for tokenised text; see `DataConfig.cache_folder`.
        trust_remote_code: run code that comes with the tokenizer where it names some.
    """

    data: str | None = None
    tokenizer: str | None = None
    text_field: str = "text"
    split: str = "train"
    dataset_config: str | None = None
    streaming: bool = False
    cache: str | None = None
    trust_remote_code: bool = False

    @property
    def cache_folder(self) -> Path:
        """Where tokenised text is kept."""
        return DataConfig(cache=self.cache).cache_folder


@dataclass(frozen=True)
class Samples:
    """The contexts of one profile.

    Attributes:
        tokens: integer array `(rows, S)`, each row cut into S // T contexts from its start.
        chosen: which contexts, counted over all rows, `(n,)` int64, in the order of the profile.
        context_length: T.
        identity: what data this is, with a checksum.
    """

    tokens: np.ndarray
    chosen: np.ndarray
    context_length: int
    identity: dict[str, Any]

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, first: int, last: int) -> Tensor:
        """Samples first … last - 1 as ids `(last - first, T)` int64."""
        per_row = self.tokens.shape[1] // self.context_length
        rows, windows = np.divmod(self.chosen[first:last], per_row)
        columns = windows[:, None] * self.context_length + np.arange(self.context_length)
        return torch.from_numpy(self.tokens[rows[:, None], columns].astype(np.int64))


def open_samples(
    source: Source, loaded: Loaded, *, n_samples: int, context_length: int, seed: int | None = None
) -> Samples:
    """The contexts that `source` holds for a model.

    Args:
        n_samples: how many, from the first on.
        context_length: T.
        seed: takes them in an order drawn from it instead.

    Raises:
        HeadwiseError: the data is missing, damaged, too short, or does not fit the model.
    """
    _check_sizes(loaded, n_samples, context_length)
    tokens, identity = _open(source, loaded, n_samples, context_length, seed)
    rows, width = tokens.shape
    name = source.data or f"the validation data of {loaded.name}"
    if width < context_length:
        raise HeadwiseError(
            f"{name} has {'sequences of ' if rows > 1 else ''}{width} tokens, less than one context "
            f"of {context_length}; pass --context-length {width} or less, or longer data"
        )
    available = rows * (width // context_length)
    if n_samples > available:
        raise HeadwiseError(
            f"{name} has {available} contexts of {context_length} tokens; "
            f"pass --n-samples {available} or less"
        )
    order = np.arange(available) if seed is None else np.random.default_rng(seed).permutation(available)
    samples = Samples(tokens, order[:n_samples].astype(np.int64), context_length, identity)
    _check_ids(samples, loaded, name)
    return samples


def _check_sizes(loaded: Loaded, n_samples: int, context_length: int) -> None:
    if n_samples < 1:
        raise HeadwiseError(f"--n-samples is {n_samples}; it must be at least 1")
    if context_length < 2:
        raise HeadwiseError(f"--context-length is {context_length}; it must be at least 2")
    if loaded.longest is not None and context_length > loaded.longest:
        raise HeadwiseError(
            f"--context-length {context_length} exceeds the {loaded.longest} learned positions "
            f"of {loaded.name}"
        )


def _check_ids(samples: Samples, loaded: Loaded, name: str) -> None:
    for first in range(0, len(samples), 256):
        ids = samples.batch(first, first + 256)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= loaded.vocab_size:
            raise HeadwiseError(
                f"{name} has the id {low if low < 0 else high}, outside the vocabulary of {loaded.name} "
                f"({loaded.vocab_size} ids); use the tokenizer it was trained with"
            )


def _open(
    source: Source, loaded: Loaded, n_samples: int, context_length: int, seed: int | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Token rows `(rows, S)` and what they are."""
    if source.data is None:
        return _data_of_run(loaded, n_samples, context_length)
    path = local(source.data)
    if path.suffix == ".npz" or (path.is_dir() and any(path.glob("*.npz"))):
        from headwise.data.shards import open_shards

        shards = open_shards(path, source.cache_folder, loaded.vocab_size)
        return shards.sequences, {"name": "shards", "checksum": shards.checksum}
    if path.exists() and not _holds_records(path):
        return _text(DataConfig(name="text", path=source.data, cache=source.cache), source, loaded)
    if source.data in TEXT and source.data != "text":
        return _text(DataConfig(name=source.data, cache=source.cache), source, loaded)
    if seed is not None:
        raise HeadwiseError(
            f"--seed {seed} shuffles data of known size, and {source.data} is read only as far as needed; "
            "leave --seed out, or make shards with `headwise data prepare`"
        )
    return _documents(source, loaded, n_samples, context_length)


def _holds_records(path: Path) -> bool:
    """Whether a file, or any in a folder, keeps texts in records; packed ones too (.jsonl.gz)."""
    files = path.iterdir() if path.is_dir() else [path]
    return any(suffix in RECORDS for file in files for suffix in file.suffixes)


def _text(config: DataConfig, source: Source, loaded: Loaded) -> tuple[np.ndarray, dict[str, Any]]:
    """The whole text as one row."""
    from headwise.data.open_text import open_text
    from headwise.data.text import Text

    parts = open_text(config)
    text = Text({"all": np.concatenate(list(parts.splits.values()))}, parts.facts)
    identity: dict[str, Any] = {"name": config.name, "path": config.path, "checksum": text.checksum}
    tokenizer = source.tokenizer or _own_tokenizer(loaded)
    if tokenizer is None:
        return text.splits["all"][None], identity | {"tokenizer": None}
    from headwise.data.tokenizer import load_tokenizer, tokenised

    loaded_tokenizer = load_tokenizer(tokenizer, trust_remote_code=source.trust_remote_code)
    splits, _ = tokenised(text, loaded_tokenizer, config.cache_folder)
    return splits["all"][None], identity | {"tokenizer": loaded_tokenizer.checksum}


def _documents(
    source: Source, loaded: Loaded, n_samples: int, context_length: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The first contexts of documents, each document cut alone, as `headwise data prepare` does."""
    from headwise.data.documents import Fields, open_documents
    from headwise.data.tokenizer import load_tokenizer

    assert source.data is not None
    name = source.tokenizer or _own_tokenizer(loaded)
    if name is None:
        raise HeadwiseError(f"{loaded.name} reads bytes; give --data as a text file, or pass --tokenizer")
    tokenizer = load_tokenizer(name, trust_remote_code=source.trust_remote_code)
    documents = open_documents(
        source.data, Fields(source.text_field, None), dataset_config=source.dataset_config,
        split=source.split, streaming=source.streaming,
    )  # fmt: skip
    rows: list[np.ndarray] = []
    for document in documents.read((0, 0)):
        ids = np.asarray(tokenizer.encode([document.text])[0], dtype=np.int32)
        whole = len(ids) // context_length
        rows.extend(ids[: whole * context_length].reshape(whole, context_length))
        if len(rows) >= n_samples:
            break
    if not rows:
        raise HeadwiseError(
            f"no document of {source.data} is as long as one context of {context_length} tokens; "
            "pass a shorter --context-length"
        )
    tokens = np.stack(rows[:n_samples])
    checksum = hashlib.sha256(tokens.tobytes()).hexdigest()
    return tokens, {"name": source.data, "checksum": checksum, "tokenizer": tokenizer.checksum}


def _own_tokenizer(loaded: Loaded) -> str | None:
    """The tokenizer of the model; None for a headwise run that read bytes."""
    return loaded.name if loaded.run is None else loaded.run.data.tokenizer


def _data_of_run(loaded: Loaded, n_samples: int, context_length: int) -> tuple[np.ndarray, dict[str, Any]]:
    if loaded.run is None:
        raise HeadwiseError(
            f"--data is missing, and {loaded.name} is no headwise run with data of its own; give shards, "
            "a text file or folder, a Hugging Face dataset, or pystdlib"
        )
    from headwise.data.base import whole_sequences
    from headwise.data.sources import open_data

    data = open_data(loaded.run.data, loaded.run.seed).at_length(context_length)
    return whole_sequences(data, "val", n_samples).inputs.numpy(), {**data.identity, "split": "val"}
