"""`headwise data prepare | inspect`: token shards from raw text, and what is in them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from headwise.cli.text_options import add_trust_option
from headwise.data.prepare import KEEP, PrepareConfig
from headwise.errors import HeadwiseError

if TYPE_CHECKING:
    from headwise.data.inspect import Inspection
    from headwise.data.tokenizer import Tokenizer


def main(argv: list[str]) -> int:
    """Run one of the two."""
    args = _parser().parse_args(argv)
    return _prepare(args) if args.action == "prepare" else _inspect(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headwise data", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="prepare|inspect")
    _add_prepare(actions.add_parser("prepare", help="make .npz token shards with a manifest"))
    _add_inspect(actions.add_parser("inspect", help="show what is in shards, and report damage"))
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokenise documents, cut each into sequences of --length tokens without overlap or padding, "
        "and write .npz shards with a manifest. Interrupted at any moment, the same command goes on."
    )
    add = parser.add_argument
    add("source", help="file or folder (jsonl, Parquet, text; packed too), or a Hugging Face dataset's name")
    add("--tokenizer", required=True, help="Hugging Face tokenizer, a path or a name; or bytes")
    add("--pattern", default="*", help="of a folder's files, those to read, such as *.c (%(default)s)")
    add("--out", required=True, metavar="DIR", help="folder for the shards")
    add("--length", type=int, default=512, help="tokens per sequence (%(default)s)")
    add("--shard-sequences", type=int, default=3000, help="sequences per shard (%(default)s)")
    add("--max-sequences", type=int, help="stop after so many sequences")
    add("--keep", nargs="+", default=list(KEEP), metavar="SOURCE",
        help="sources to keep, or all (%(default)s); the prefix RedPajama may be left out")  # fmt: skip
    add("--drop", nargs="+", default=[], metavar="SOURCE", help="sources to drop of those")
    add("--text-field", default="text", help="the record's text (%(default)s)")
    add("--source-field", default="meta.redpajama_set_name", help="the record's source (%(default)s)")
    add("--dataset-config", help="configuration of a Hugging Face dataset")
    add("--split", default="train", help="split of a Hugging Face dataset (%(default)s)")
    add("--streaming", action="store_true", help="stream the dataset instead of downloading it first")
    add("--cache", metavar="DIR", help="folder for the dataset's download")
    add_trust_option(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show shape, type, statistics and token frequencies of shards, and report damage."
    add = parser.add_argument
    add("path", help="a folder of .npz shards, or one of them")
    add("--tokenizer", help="show tokens as text, and check ids and padding against it")
    add("--vocab-size", type=int, help="ids must be below it")
    add("--top", type=int, default=20, help="number of most frequent tokens to show (%(default)s)")
    add("--json", action="store_true", help="print JSON instead of tables")
    add_trust_option(parser)


def _prepare(args: argparse.Namespace) -> int:
    from headwise.data.prepare import prepare

    values = {key: value for key, value in vars(args).items() if key != "action"}
    config = PrepareConfig(**{**values, "keep": tuple(args.keep), "drop": tuple(args.drop)})
    manifest = prepare(config)
    for name, counts in manifest["sources"].items():
        kept = f"{counts['sequences']:,} sequences" if counts["kept"] else "dropped"
        print(f"{name}: {counts['documents']:,} documents, {kept}")
    unseen = [name for name in config.keep if not config.keeps_all and not _seen(config, name, manifest)]
    if unseen:
        print(f"headwise: no document has the source {', '.join(unseen)}", file=sys.stderr)
    print(
        f"{args.out}: {manifest['sequences']:,} sequences of {args.length} tokens "
        f"in {len(manifest['shards'])} shards, checked"
    )
    return 0


def _seen(config: PrepareConfig, name: str, manifest: dict) -> bool:
    alone = PrepareConfig(config.source, config.tokenizer, config.out, keep=(name,))
    return any(alone.wants(source) for source in manifest["sources"])


def _inspect(args: argparse.Namespace) -> int:
    from headwise.data.inspect import inspect_shards
    from headwise.data.tokenizer import load_tokenizer

    tokenizer = None
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer, trust_remote_code=args.trust_remote_code)
    result = inspect_shards(args.path, vocab_size=args.vocab_size, tokenizer=tokenizer)
    if args.json:
        print(json.dumps(result.as_dict(args.top), indent=2))
    else:
        _print(result, args.top, tokenizer)
    if result.damage:
        more = f" (and {len(result.damage) - 1} more, listed above)" if len(result.damage) > 1 else ""
        raise HeadwiseError(f"damage in {args.path}: {result.damage[0]}{more}")
    return 0


def _print(result: Inspection, top: int, tokenizer: Tokenizer | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    shards = Table("file", "shape", "type", "min", "max", "mean", "std", "unique", title="shards")
    for shard in result.shards:
        shape = " x ".join(map(str, shard.shape))
        numbers = (shard.min, shard.max, f"{shard.mean:.1f}", f"{shard.std:.1f}", shard.unique)
        shards.add_row(escape(shard.file), shape, shard.dtype, *map(str, numbers))
    console.print(shards)
    frequent = Table("id", "count", "share", "token", title="most frequent tokens")
    for index, count in result.most_frequent(top):
        token = repr(tokenizer.token(index)) if tokenizer and index < tokenizer.vocab_size else ""
        frequent.add_row(str(index), f"{count:,}", f"{count / result.tokens:.2%}", escape(token))
    console.print(frequent)
    console.print(
        f"{result.sequences:,} sequences, {result.tokens:,} tokens, {len(result.ids):,} different ids, "
        f"entropy of their frequencies {result.entropy():.3f} nats",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for line in result.damage:
        console.print(f"damage: {line}", markup=False, highlight=False, soft_wrap=True)
