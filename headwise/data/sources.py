"""From a configuration to data: `open_data`."""

from __future__ import annotations

import hashlib
from typing import Any

from headwise.data.base import SPLITS, Data
from headwise.data.config import SYNTHETIC, DataConfig
from headwise.data.corpus import Corpus
from headwise.data.open_text import open_text
from headwise.data.synthetic import TASKS
from headwise.data.text import Text


def open_data(config: DataConfig, seed: int) -> Data:
    """The data that `config` names; `seed` decides the order (tasks: the training sequences).

    Raises:
        HeadwiseError: the configuration or the data cannot be used; nothing is left half-made.
    """
    config.validate()
    if config.name in SYNTHETIC:
        return TASKS[config.name](config, seed)
    if config.name == "shards":
        return _shards(config, seed)
    text = open_text(config)
    return _tokens(text, config, seed) if config.tokenizer else _bytes(text, config, seed)


def _bytes(text: Text, config: DataConfig, seed: int) -> Corpus:
    n_bytes = {split: len(part) for split, part in text.splits.items()}
    return Corpus(
        {split: part[None, :] for split, part in text.splits.items()},
        seq_len=config.seq_len,
        seed=seed,
        vocab_size=256,
        identity={
            "name": config.name,
            "checksum": text.checksum,
            "vocab_size": 256,
            "tokens": n_bytes,
            "bytes": n_bytes,
            "tokenizer": None,
            **text.facts,
        },
        bytes_per_token=dict.fromkeys(n_bytes, 1.0),
    )


def _tokens(text: Text, config: DataConfig, seed: int) -> Corpus:
    from headwise.data.tokenizer import load_tokenizer, tokenised

    assert config.tokenizer is not None
    tokenizer = load_tokenizer(config.tokenizer)
    splits, n_bytes = tokenised(text, tokenizer, config.cache_folder)
    n_tokens = {split: len(part) for split, part in splits.items()}
    joint = hashlib.sha256(f"{text.checksum} {tokenizer.checksum}".encode()).hexdigest()
    return Corpus(
        {split: part[None, :] for split, part in splits.items()},
        seq_len=config.seq_len,
        seed=seed,
        vocab_size=tokenizer.vocab_size,
        identity={
            "name": config.name,
            "checksum": joint,
            "text_checksum": text.checksum,
            "vocab_size": tokenizer.vocab_size,
            "tokens": n_tokens,
            "bytes": n_bytes,
            "tokenizer": {"name": tokenizer.name, "checksum": tokenizer.checksum},
            **text.facts,
        },
        bytes_per_token={split: n_bytes[split] / max(1, n_tokens[split]) for split in splits},
    )


def _shards(config: DataConfig, seed: int) -> Corpus:
    from headwise.data.shards import open_shards, split_rows

    assert config.path is not None  # DataConfig.validate
    tokenizer: dict[str, Any] | None = None
    bytes_per_token = None
    vocab_size = config.vocab_size
    if config.tokenizer:
        from headwise.data.tokenizer import BYTES, load_tokenizer

        loaded = load_tokenizer(config.tokenizer)
        tokenizer = {"name": loaded.name, "checksum": loaded.checksum}
        bytes_per_token = dict.fromkeys(SPLITS, 1.0) if loaded.name == BYTES else None
        vocab_size = vocab_size or loaded.vocab_size
    shards = open_shards(config.path, config.cache_folder, vocab_size)
    splits = split_rows(shards.sequences)
    return Corpus(
        splits,
        seq_len=config.seq_len,
        seed=seed,
        vocab_size=shards.vocab_size,
        identity={
            "name": config.name,
            "checksum": shards.checksum,
            "vocab_size": shards.vocab_size,
            "tokens": {split: part.size for split, part in splits.items()},
            "tokenizer": tokenizer,
            "files": shards.files,
        },
        bytes_per_token=bytes_per_token,
    )
