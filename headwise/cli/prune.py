"""`headwise prune`: remove heads by a measure, and test whether the measure predicts their importance."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.cli.quiet import quiet_transformers
from headwise.cli.text_options import add_text_options, add_trust_option, source_of

if TYPE_CHECKING:
    from headwise.questions.prune.measure import Pruned


def main(argv: list[str]) -> int:
    """Prune, print the conclusion and the numbers, write the folder; returns the exit code."""
    args = _parser().parse_args(argv)

    from headwise.questions.prune.measure import Options, prune
    from headwise.questions.prune.write import folder_for, write
    from headwise.training.distributed import find_device

    options = Options(
        args.mode, args.fraction, args.by, args.per_layer, args.zero, args.last, args.draws, args.sequences,
        args.context_length, args.batch_size, args.seed, source_of(args),
    )  # fmt: skip
    options.validate()
    out = folder_for(args.model, options, args.out)
    quiet_transformers()
    found = prune(args.model, options, dtype=args.dtype, device=find_device(args.device), progress=_progress)
    write(found, out, trust_remote_code=args.trust_remote_code)
    _report(found, out)
    return 0


def _progress(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    from headwise.data.progress import progress

    return progress(what, total, "losses")


def _report(found: Pruned, out: Path) -> None:
    from headwise.bench.harness import print_table
    from headwise.questions.prune import page

    record = found.record
    print("\n".join(page.statements(record)))
    for table in (page.before_and_after(record), page.laws(record)):
        if table.rows:
            print()
            print_table([dict(zip(table.headers, row, strict=True)) for row in table.rows])
    print()
    print("\n".join(f"note: {note}" for note in page.notes(record)))
    print(f"\nwrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if found.after.loaded.run is not None:
        print(f"to continue its training: headwise train --resume --out {shlex.quote(str(out))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwise prune",
        description="Permanently remove a share of the heads, ranked by a measure: matrices become smaller, "
        "and layers may then differ in their number of heads. Reports loss, perplexity and speed before and "
        "after, random removals as the control, and whether the measure predicts the loss without each head. "
        "Query heads that share one of several key/value heads are removed together.",
    )
    add = parser.add_argument
    add("model", metavar="RUN|MODEL", help="headwise run, folder of a Hugging Face model, or its name")
    add(
        "--mode", required=True, help="remove low (the lowest values), high, mixed (by turns) or random heads"
    )
    add("--fraction", type=float, required=True, metavar="SHARE", help="of the heads, above 0 and below 1")
    add("--by", default="entropy", metavar="MEASURE",
        help="entropy, entanglement, max_weight, importance (the loss without each head) or any other "
        "measure of `headwise show-config --list-measures` (%(default)s)")  # fmt: skip
    add("--per-layer", action="store_true", help="rank within each layer; default over all layers")
    add("--zero", action="store_true", help="leave the heads in place and set their outputs to 0")
    add("--last", type=int, default=3, metavar="N",
        help="evaluations of a run's head table to average; 0 measures the heads now "
        "(%(default)s)")  # fmt: skip
    add("--draws", type=int, default=5, metavar="N", help="random removals as the control (%(default)s)")
    add("--sequences", type=int, default=32, metavar="N",
        help="sequences for the loss; as many others rank heads that are measured now "
        "(%(default)s)")  # fmt: skip
    add("--context-length", type=int, metavar="T", help="tokens per sequence; default the run's own, or 512")
    add("--batch-size", type=int, default=8, help="sequences per pass (%(default)s)")
    add("--seed", type=int, default=0, help="of random removals and of resampling (%(default)s)")
    add("--data", help="text, as for `headwise intervene`; default the run's own validation data")
    add("--out", metavar="DIR",
        help="folder of the pruned model (default: RUN/prune/…, or results/prune/… for a model)")  # fmt: skip
    add("--dtype", default="auto", help="of the model: auto (as stored), float32, bfloat16, float16")
    add("--device", default="auto", help="cpu, cuda, cuda:1, or auto")
    add_trust_option(parser)
    add_text_options(parser)
    return parser
