"""The options that select where runs are executed, and the executor that they select."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.errors import HeadwiseError, in_range, one_of

if TYPE_CHECKING:
    import torch

    from headwise.study.executor import Executor
    from headwise.study.study import Study

MOST = 1024
"""The most processors or GPUs of a run."""


@dataclass(frozen=True)
class Where:
    """Where the runs of a study are executed, as given on the command line.

    Attributes:
        name: of the executor.
        workers: the most runs at a time; None for as many as the cluster has room for.
        cpus, gpus: `--cpus-per-run` and `--gpus-per-run`.
        address: of a Ray cluster.
        slurm: `KEY=VALUE` of sbatch.
    """

    name: str = "local"
    workers: int | None = None
    cpus: int | None = None
    gpus: int | None = None
    address: str | None = None
    slurm: tuple[str, ...] = ()

    def device(self, study: Study) -> torch.device | None:
        """The device of the runs on a cluster; None on this machine, where each run finds its own."""
        import torch

        if self.name == "local":
            return None
        return torch.device("cuda" if self._gpus(study) else "cpu")

    def executor(self, study: Study, runs: int, folder: Path) -> Executor:
        """The executor of a study in `folder` with so many runs.

        Raises:
            HeadwiseError: it is not installed, does not answer, or lacks the resources of a run.
        """
        from headwise.study.executor import Resources, executor_named

        if self.name == "local":
            workers = min(study.workers, runs)
            cpus = self.cpus or max(1, (os.cpu_count() or 1) // workers)
            resources = Resources(cpus, self.gpus or 0, workers)
        else:
            resources = Resources(self.cpus or 1, self._gpus(study), self.workers)
        return executor_named(self.name, resources, folder, address=self.address, slurm=self.slurm)

    def _gpus(self, study: Study) -> int:
        return self.gpus if self.gpus is not None else int(study.device.startswith("cuda"))

    def check(self, study: Study, root: Path) -> None:
        """Refuse options that contradict each other, before anything is planned.

        Args:
            root: the folder of the study's folder.

        Raises:
            HeadwiseError: two options contradict each other; the message names them.
        """
        from headwise.study.executor import EXECUTORS

        one_of("--executor", self.name, EXECUTORS)
        for flag, number in (("--cpus-per-run", self.cpus), ("--gpus-per-run", self.gpus)):
            if number is not None:
                in_range(flag, number, int(flag == "--cpus-per-run"), MOST)
        if re.match(r"[a-z][a-z0-9+.]*:/", str(root)):
            url = str(root).replace(":/", "://", 1)  # a path has one of its slashes
            raise HeadwiseError(
                f"--out {url} is not a folder: give a folder that all machines mount; `headwise runs push` "
                "copies runs to a URL"
            )
        if self.gpus and study.device == "cpu":
            raise HeadwiseError("--gpus-per-run contradicts --device cpu; leave one of them out")
        if (self.gpus or 0) > 1 and (study.fit_batch or study.memory_limit):
            raise HeadwiseError(
                "a run on several GPUs cannot halve its batch to fit into memory: leave out --memory-limit "
                "and fit_batch (always on in a sweep), or use one GPU per run"
            )
        if self.name == "local":
            return
        if study.max_length_at:
            raise HeadwiseError(
                f"--max-length-at measures this machine, but --executor {self.name} trains on others; leave "
                "one of them out"
            )
        if ":" in study.device:
            raise HeadwiseError(
                f"--device {study.device} names one GPU of one machine; use --device cuda with --executor "
                f"{self.name}"
            )
        if study.device == "cuda" and self.gpus == 0:
            raise HeadwiseError("--gpus-per-run 0 contradicts --device cuda; leave one of them out")


def add_executor_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    add = parser.add_argument
    add("--executor", default="local", metavar="NAME",
        help="where the runs are executed: local (this machine), ray or slurm (default: local)")  # fmt: skip
    add("--address", metavar="HOST:PORT", help="of the Ray cluster (default: the cluster of this machine)")
    add("--slurm", metavar="KEY=VALUE", action="append", default=[],
        help="an option of sbatch, such as partition=gpu or time=04:00:00; can be repeated")  # fmt: skip
    add("--cpus-per-run", metavar="N", type=int,
        help="threads of each process (default: an equal share on this machine, 1 on a cluster)")  # fmt: skip
    add("--gpus-per-run", metavar="N", type=int,
        help="GPUs of a run, all on one machine; several train it together, as with torchrun")  # fmt: skip


def where_of(arguments: argparse.Namespace) -> Where:
    """The options, parsed."""
    return Where(
        arguments.executor, arguments.workers, arguments.cpus_per_run, arguments.gpus_per_run,
        arguments.address, tuple(arguments.slurm),
    )  # fmt: skip
