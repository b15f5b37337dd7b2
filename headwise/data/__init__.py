"""Data: sequences of tokens for training and exact evaluation, from synthetic tasks or text.

    data = open_data(DataConfig(name="enwik8", bytes=10_000_000, seq_len=256), seed=1337)
    loader = train_loader(data, batch_sequences=64, micro_batch=16, start_step=0)
    inputs, targets = next(loader)                  # (16, 256) int64; targets -100: not counted
    for batch in eval_batches(data, "val", 64):     # every token of the split, once
        ...

Whatever the source, the object has the protocol `Data` (base.py):

- `vocab_size`, `seq_len`, `identity` (with the `checksum` that tells data apart),
  `bytes_per_token` (per split, or None), `predictable`, `entropy_floor`;
- `n_sequences(split)`, `batch(split, indices)`, `at_length(seq_len)`;
- `train_indices(step, n)`: a pure function of (seed, step * n), so a resume needs the step alone.

Files: config (the section `data` of a configuration) · sources (`open_data`) · base (the
protocol) · order, corpus, synthetic (which tokens make a sequence) · text, stdlib, enwik8,
wikitext, tokenizer, shards (where tokens come from) · loader (batches for the trainer) · prepare,
documents, inspect (shards from raw text, and what is in them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headwise.data.config import DataConfig

if TYPE_CHECKING:
    from headwise.data.base import IGNORE, SPLITS, Batch, Data
    from headwise.data.loader import eval_batches, train_loader
    from headwise.data.sources import open_data

__all__ = [
    "IGNORE",
    "SPLITS",
    "Batch",
    "Data",
    "DataConfig",
    "eval_batches",
    "open_data",
    "train_loader",
]

_HOMES = {
    "IGNORE": "base",
    "SPLITS": "base",
    "Batch": "base",
    "Data": "base",
    "eval_batches": "loader",
    "open_data": "sources",
    "train_loader": "loader",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a configuration can be read without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
