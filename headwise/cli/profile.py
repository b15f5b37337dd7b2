"""`headwise profile`: measure every head of a checkpoint over many contexts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.cli.quiet import quiet_transformers
from headwise.cli.text_options import add_text_options, add_trust_option, source_of
from headwise.errors import HeadwiseError
from headwise.files import must_be_folder
from headwise.measures.spec import measures, wanted_measures

if TYPE_CHECKING:
    from headwise.questions.profile.config import ProfileConfig

PART_TOKENS = 2048
"""Of a part, unless asked for otherwise: small ones are written while the model goes on."""


def main(argv: list[str]) -> int:
    """Profile, or go on with a profile; returns the exit code."""
    return run(make_parser("headwise profile").parse_args(argv))


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The options of a profile, for `profile` and `show-config`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measure every attention head of a model over contexts of text, into a head table. "
        "Interrupted, the same command goes on. Under torchrun, processes share the contexts.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, Hugging Face name, or headwise run")
    add("--data", help="shards, text file or folder, jsonl, Parquet, Hugging Face dataset, pystdlib, enwik8, "
        "wikitext103; for a headwise run default its own validation data")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="folder for the table and what is drawn from it")
    add("--n-samples", type=int, default=64, help="contexts to measure (%(default)s)")
    add("--context-length", type=int, default=512, help="tokens per context (%(default)s)")
    add("--seed", type=int, help="draw contexts at random; default: in order from the first")
    add("--scores", default="pre_rope", help="pre_rope or post_rope: logits before or after rotation "
        "(%(default)s)")  # fmt: skip
    add("--measures", nargs="+", metavar="NAME",
        help="columns of the table, of: " + ", ".join(measures()) + ", and those of kinds of attention, "
        "which show-config --list-measures has (default: all)")  # fmt: skip
    add("--aggregate", action="store_true", help="one row per (sample, layer, head), not one per token")
    add(
        "--ignore-first",
        type=int,
        default=2,
        help="first tokens without an entropy, or another measure that needs a context (%(default)s)",
    )
    add("--raw-layers", type=int, nargs="+", default=[], metavar="L", help="keep q, k, v of these layers")
    add("--export", choices=["csv"], help="csv: the query-scaling study's columns and file name")
    add("--dtype", default="auto", help="of the model: auto (as stored), float32, bfloat16, float16")
    add("--table-dtype", default="float32", help="of the measures on disk: float32 or float16")
    add("--batch-size", type=int, default=8, help="contexts per forward pass (%(default)s)")
    add(
        "--samples-per-part",
        type=int,
        help=f"contexts per Parquet part (as many as have {PART_TOKENS} tokens)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1, or auto")
    add("--no-atlas", action="store_true", help="write no atlas.html")
    add_trust_option(parser)
    add_text_options(parser)
    return parser


def config_of(args: argparse.Namespace) -> ProfileConfig:
    """What decides the table, checked.

    Raises:
        HeadwiseError: a value that cannot be used.
    """
    from headwise.questions.profile.config import ProfileConfig
    from headwise.questions.profile.export import NEEDED

    part = args.samples_per_part
    if part is None:
        part = max(1, PART_TOKENS // max(1, args.context_length))
    wanted = wanted_measures(None) if args.measures is None else tuple(args.measures)
    config = ProfileConfig(
        n_samples=args.n_samples, context_length=args.context_length, seed=args.seed, scores=args.scores,
        measures=wanted, aggregate=args.aggregate, ignore_first=args.ignore_first,
        table_dtype=args.table_dtype, raw_layers=tuple(args.raw_layers),
        samples_per_part=part,
    )  # fmt: skip
    config.validate()
    if args.export and (config.aggregate or not set(NEEDED) <= set(config.measures)):
        raise HeadwiseError(
            f"--export csv has a row per token with {', '.join(NEEDED)}; "
            "leave out --aggregate, and name them in --measures"
        )
    return config


def run(args: argparse.Namespace) -> int:
    """Do what the options say."""
    from headwise.questions.profile.measure import Profile, Share
    from headwise.training.distributed import join, leave
    from headwise.watch.load import load
    from headwise.watch.samples import open_samples

    config = config_of(args)
    must_be_folder(args.out)
    world = join(args.device)
    try:
        profile = Profile(args.out, config)
        quiet_transformers()
        loaded = load(
            args.model, dtype=args.dtype, device=world.device, trust_remote_code=args.trust_remote_code
        )
        samples = open_samples(
            source_of(args), loaded, n_samples=config.n_samples, context_length=config.context_length,
            seed=config.seed,
        )  # fmt: skip
        share = Share(world.rank, world.size, world.wait)
        with _progress(profile, world.leads, world.size) as advance:
            summary = profile.run(loaded, samples, batch_size=args.batch_size, share=share, advance=advance)
        if world.leads:
            _conclude(args, summary, loaded.rotates)
    finally:
        leave()
    return 0


def _conclude(args: argparse.Namespace, summary: dict[str, Any], rotates: bool) -> None:
    from headwise.measures.table import unmeasured_lines

    out = Path(args.out)
    lines = [f"{summary['heads']} heads over {summary['tokens']:,} tokens, {summary['bytes'] / 1e6:,.1f} MB"]
    if summary["parts_measured"]:
        lines[0] += f", {summary['seconds']:.1f} s"
    if summary["layers_with_nan"]:
        layers = ", ".join(map(str, summary["layers_with_nan"]))
        print(f"headwise: measures are NaN in layer {layers}; are there NaN weights?", file=sys.stderr)
    for line in unmeasured_lines(summary.get("unmeasured", {})):
        print(f"headwise: {line}", file=sys.stderr)
    lines.append(f"table: {out / 'heads'}  per head: {out / 'per_head.csv'}")
    if args.export:
        from headwise.questions.profile.export import export_csv

        lines.append(f"csv: {export_csv(out)}")
    if not args.no_atlas:
        lines.append(_atlas(out, rotates))
    print("\n".join(lines))


def _atlas(out: Path, rotates: bool) -> str:
    from headwise.questions.profile.page import atlas

    try:
        return f"atlas: {atlas(out, rotates=rotates)}"
    except ImportError as error:
        return f"no atlas: {error.name} is not installed"


@contextmanager
def _progress(profile: Any, shown: bool, world_size: int) -> Iterator[Callable[[int], None]]:
    """Tokens done, their rate and the time left, over all processes as far as this one can tell."""
    if not shown:
        yield lambda tokens: None
        return
    from headwise.data.progress import progress

    length = profile.config.context_length
    left = sum(last - first for first, last in map(profile.samples_of, profile.missing()))
    total = profile.config.n_samples * length
    with progress("profiling", total, "tokens", total - left * length) as advance:
        yield lambda tokens: advance(tokens * world_size)
