"""`headwise export`: a run as a folder for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.cli.quiet import quiet_transformers
from headwise.data.config import TEXT, DataConfig
from headwise.data.shards import read_manifest
from headwise.errors import HeadwiseError
from headwise.files import local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main(argv: list[str]) -> int:
    """Export; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="headwise export",
        description="Write a run's weights (its best checkpoint, or its latest where none is marked) as a "
        "folder that transformers loads, after comparing the logits; and the run's tokenizer, where it is on "
        "this machine.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--format", default="huggingface", choices=["huggingface"], help="(%(default)s)")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)

    from headwise.model.export import export, family_of
    from headwise.runs.weights import load_model

    model, config = load_model(args.run)
    family = family_of(model, args.run)
    quiet_transformers()
    tokenizer, what = _tokenizer(config.data)
    difference = export(model, args.out, args.run, tokenizer)
    print(f"{args.out}: {family}-shaped, logits within {difference:.1g} of the run's; tokenizer: {what}")
    return 0


def _tokenizer(data: DataConfig) -> tuple[PreTrainedTokenizerBase | None, str]:
    """What the run's text was read with, and a word on it."""
    from headwise.data.tokenizer import load_tokenizer
    from headwise.model.export import byte_tokenizer, local_tokenizer

    name = data.tokenizer or _of_shards(data)
    if name is None and data.name in TEXT:
        return byte_tokenizer(), "one token per byte"
    if name is None:
        return None, f"none, for {data.name} data names none"
    file = Path(name).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if file.is_file():
        load_tokenizer(str(file))  # refuses a damaged one, which transformers does not say in a sentence
    tokenizer = local_tokenizer(name)
    missing = f"none, for {name} is not on this machine (name one with --tokenizer where text is read)"
    return tokenizer, name if tokenizer else missing


def _of_shards(data: DataConfig) -> str | None:
    """The tokenizer that the manifest of the run's shards names."""
    if data.name != "shards" or data.path is None:
        return None
    try:
        manifest = read_manifest(local(data.path))
        return str(manifest["settings"]["tokenizer"]["name"]) if manifest else None
    except (HeadwiseError, LookupError):  # damaged, a single file, or made elsewhere
        return None
