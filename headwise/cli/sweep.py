"""`headwise sweep FILE.yaml`: a study with axes that fits the batch of its runs into memory."""

from __future__ import annotations

import shlex
from pathlib import Path

from headwise.errors import HeadwiseError

DESCRIPTION = (
    "Run a study with axes, such as lengths x ranks x kinds. An axis that is an option of one kind applies "
    "only to that kind. A run that does not fit into memory starts again with half the batch and the same "
    "tokens per step; it is out_of_memory if one sequence does not fit. sweep_results.csv has one row per "
    "run. After an interruption the same command continues the sweep."
)


def main(argv: list[str]) -> int:
    """Run the sweep, write its table and its report; returns the exit code."""
    from headwise.cli.executors import where_of
    from headwise.cli.study import carry_out, parser, study_of

    arguments, flags = parser("sweep", DESCRIPTION).parse_known_args(argv)
    study = study_of(arguments, flags, f"headwise sweep {shlex.join(argv)}")
    if not study.axes and not study.max_length_at:
        raise HeadwiseError(
            f"study {study.name!r} has no axes: give one in its file or on the command line, "
            "such as --axes.data.seq_len=[512,1024]"
        )
    study.fit_batch = True
    return carry_out(study, Path(arguments.out), only_plan=arguments.plan, where=where_of(arguments))
