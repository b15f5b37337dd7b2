"""What `data.*` may say. Imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from headwise.errors import HeadwiseError, in_range, one_of

SYNTHETIC = ("copy", "repeat", "ngram")
TEXT = ("pystdlib", "enwik8", "text", "wikitext103")
NAMES = (*SYNTHETIC, "shards", *TEXT)

LONGEST = 2**24
MOST_TOKENS = 2**31

_TAKES_PATH = ("shards", "enwik8", "text", "wikitext103")
_NEEDS_PATH = ("shards", "text")


@dataclass
class DataConfig:
    """Which tokens a model sees, and how many at a time.

    Args:
        name: copy, repeat, ngram (synthetic tasks), shards (.npz token shards), pystdlib
            (sources of Python's standard library), enwik8, text (a file or folder), wikitext103.
        path: file or folder for shards and text; for enwik8 and wikitext103 it replaces the download.
        bytes: use at most the first N bytes of the text; 10_000_000 of enwik8 is "enwik8-mini".
        fraction: share of wikitext103's training text to use, from its start.
        seq_len: tokens per sequence, T.
        batch_size: sequences per step and process group, before accumulation.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        pin_memory: copy batches through page-locked memory; has an effect on CUDA only.
        tokenizer: Hugging Face tokenizer, a path or a name; without it, text is read as bytes. Shards
            that were made of bytes have the tokenizer `bytes`.
        cache: folder for downloads and tokenised text; default $HEADWISE_CACHE or ~/.cache/headwise.
        eval_seq_lens: evaluate at these sequence lengths too.
        eval_fraction: share of the validation split to evaluate, evenly spread over it.
        vocab_size: synthetic tasks: number of tokens, default 256. Shards: number of ids allowed,
            default what their manifest or tokenizer says, else the largest id + 1.
        eval_sequences: synthetic tasks: sequences in the validation and in the test split.
        ngram_order: ngram: the next token depends on the last `ngram_order - 1` tokens.
        ngram_branching: ngram: number of tokens that can follow a context.
    """

    name: str = "pystdlib"
    path: str | None = None
    bytes: int | None = None
    fraction: float = 1.0
    seq_len: int = 256
    batch_size: int = 16
    num_workers: int = 0
    pin_memory: bool = True
    tokenizer: str | None = None
    cache: str | None = None
    eval_seq_lens: list[int] = field(default_factory=list)
    eval_fraction: float = 1.0
    vocab_size: int | None = None
    eval_sequences: int = 128
    ngram_order: int = 2
    ngram_branching: int = 8

    @property
    def cache_folder(self) -> Path:
        """Where downloads and tokenised text are kept."""
        given = self.cache or os.environ.get("HEADWISE_CACHE") or "~/.cache/headwise"
        return Path(given).expanduser()

    def batch_size_at(self, length: int) -> int:
        """Sequences of `length` tokens that hold as many tokens as a batch does, at least one."""
        return max(1, self.batch_size * self.seq_len // length)

    def validate(self) -> None:
        """Refuse what cannot be used, before anything is read.

        Raises:
            HeadwiseError: a value is out of range, or does not go with `name`.
        """
        one_of("data.name", self.name, NAMES)
        self._check_ranges()
        self._check_synthetic()
        if self.name in _NEEDS_PATH and not self.path:
            raise HeadwiseError(f"data.name={self.name} needs data.path, a file or folder; none is given")
        for key, names in (
            ("path", _TAKES_PATH),
            ("bytes", ("pystdlib", "enwik8", "text")),
            ("tokenizer", (*TEXT, "shards")),
            ("vocab_size", (*SYNTHETIC, "shards")),
        ):
            value = getattr(self, key)
            if value is not None and self.name not in names:
                raise HeadwiseError(
                    f"data.{key}={value!r} has no meaning for data.name={self.name}; "
                    f"leave it out, or set data.name to one of {', '.join(names)}"
                )
        if self.fraction != 1.0 and self.name != "wikitext103":
            raise HeadwiseError(
                f"data.fraction={self.fraction} is for data.name=wikitext103, not {self.name}; "
                "data.bytes limits other texts"
            )

    def _check_ranges(self) -> None:
        for key, least, most in (
            ("seq_len", 2, LONGEST),
            ("batch_size", 1, 2**20),
            ("num_workers", 0, 2**10),
            ("bytes", 1, 2**50),
            ("eval_sequences", 1, 2**24),
            ("vocab_size", 2, 2**24),
        ):
            in_range(f"data.{key}", getattr(self, key), least, most)
        for key in ("batch_size", "eval_sequences"):
            if getattr(self, key) * self.seq_len > MOST_TOKENS:
                raise HeadwiseError(
                    f"data.{key} {getattr(self, key)} x data.seq_len {self.seq_len} are more tokens than "
                    f"the {MOST_TOKENS:,} that can be read at a time; lower one of them"
                )
        for key in ("fraction", "eval_fraction"):
            value = getattr(self, key)
            if not 0.0 < value <= 1.0:
                raise HeadwiseError(f"data.{key}={value} is not a share; it must be above 0 and at most 1")
        for length in self.eval_seq_lens:
            in_range("data.eval_seq_lens", length, 2, LONGEST)

    def _check_synthetic(self) -> None:
        vocab_size = 256 if self.vocab_size is None else self.vocab_size
        in_range("data.ngram_order", self.ngram_order, 2, 17)
        in_range("data.ngram_branching", self.ngram_branching, 1, 2**24)
        if self.name != "ngram":
            return
        if not 2 <= self.ngram_branching <= vocab_size:
            raise HeadwiseError(
                f"data.ngram_branching={self.ngram_branching} must be between 2 and "
                f"data.vocab_size={vocab_size}"
            )
        if vocab_size ** (self.ngram_order - 1) > 2**16:
            raise HeadwiseError(
                f"data.ngram_order={self.ngram_order} with data.vocab_size={vocab_size} must "
                "have at most 65536 contexts, vocab_size ** (ngram_order - 1)"
            )
