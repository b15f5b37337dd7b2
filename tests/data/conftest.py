"""Small texts, a small tokenizer and small shards, made anew for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def prose() -> str:
    """About 60 kB of lines with characters of one to four bytes."""
    words = ["head", "wise", "é", "größe", "注意", "𝛼", "query", "key", "value", "the"]
    lots = np.random.default_rng(0).integers(len(words), size=12_000)
    lines = [" ".join(words[i] for i in line) for line in lots.reshape(-1, 8)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory, prose: str) -> Path:
    """A byte-level BPE tokenizer with about 300 tokens, <pad> the first of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([prose], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    path.with_name("tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    return path
