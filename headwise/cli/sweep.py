"""`headwise sweep FILE.yaml`: a study with axes, in which memory decides what runs."""

from __future__ import annotations

import shlex
from pathlib import Path

from headwise.errors import HeadwiseError

DESCRIPTION = (
    "Run a study with axes, such as lengths x ranks x kinds. An axis that is an option of one kind applies "
    "to that kind alone. A run that does not fit into memory goes on with half the batch and as many tokens "
    "a step, and is out_of_memory where one sequence does not fit. sweep_results.csv has a row a run; "
    "the same command goes on after an interruption."
)


def main(argv: list[str]) -> int:
    """Run the sweep, write its table and its report; returns the exit code."""
    from headwise.cli.study import carry_out, parser, study_of

    arguments, flags = parser("sweep", DESCRIPTION).parse_known_args(argv)
    study = study_of(arguments, flags, f"headwise sweep {shlex.join(argv)}")
    if not study.axes and not study.max_length_at:
        raise HeadwiseError(
            f"study {study.name!r} has no axes to sweep over: name one in its file, or on the command line, "
            "such as --axes.data.seq_len=[512,1024]"
        )
    study.fit_batch = True
    return carry_out(study, Path(arguments.out), only_plan=arguments.plan)
