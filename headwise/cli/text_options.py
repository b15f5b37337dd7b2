"""The options of verbs that read text for a checkpoint: which text, and how it becomes tokens."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headwise.watch.samples import Source


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """`--trust-remote-code`, off by default."""
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="run code that the model or the tokenizer brings along; read it first",
    )  # fmt: skip


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """`--tokenizer`, `--text-field` and the rest, as a group of their own."""
    text = parser.add_argument_group("text")
    text.add_argument("--tokenizer", help="path or name; default the model's own")
    text.add_argument("--text-field", default="text", help="of jsonl, Parquet and datasets (%(default)s)")
    text.add_argument("--split", default="train", help="of a Hugging Face dataset (%(default)s)")
    text.add_argument("--dataset-config", help="configuration of a Hugging Face dataset")
    text.add_argument("--streaming", action="store_true", help="stream the dataset, download nothing whole")
    text.add_argument("--cache", metavar="DIR", help="folder for tokenised text")


def source_of(args: argparse.Namespace) -> Source:
    """Where the tokens come from."""
    from headwise.watch.samples import Source

    return Source(
        args.data,
        args.tokenizer,
        args.text_field,
        args.split,
        args.dataset_config,
        args.streaming,
        args.cache,
        args.trust_remote_code,
    )
