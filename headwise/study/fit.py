"""Runs that do not fit into memory: the batch is halved, or running out of memory is the result."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headwise.config.run import Config, load, to_yaml
from headwise.data import open_data
from headwise.runs.delete import discard
from headwise.study.memory_size import parse_size
from headwise.study.study import Study
from headwise.training.distributed import find_device
from headwise.training.memory import MEASURED_BY, OutOfMemory, limit_memory, training_peak
from headwise.training.run import train, with_vocabulary

if TYPE_CHECKING:
    from headwise.study.plan import PlannedRun


@dataclass(frozen=True)
class Fit:
    """How a run that does not fit into memory is treated.

    Attributes:
        shrink: halve `data.batch_size`, as often as is needed; else the run ends as out_of_memory.
        limit: bytes that training may use; None for the memory of the device.
    """

    shrink: bool = False
    limit: int | None = None


NO_FIT = Fit()
"""A run that does not fit into memory ends as out_of_memory."""


def fit_of(study: Study) -> Fit:
    """The `Fit` of a study."""
    limit = study.memory_limit
    return Fit(study.fit_batch, None if limit is None else parse_size("memory_limit", limit))


def smaller(config: Config) -> Config | None:
    """`config` with half the sequences a pass and as many tokens a step; None where a pass has one sequence.

    Where half does not divide the sequences of a step, the next smaller number that does is taken.
    """
    size, length = config.data.batch_size, config.data.seq_len
    if size == 1:
        return None
    tokens = config.training.total_batch_tokens or size * length
    sequences = tokens // length
    half = next(number for number in range(size // 2, 0, -1) if sequences % number == 0)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=half),
        training=dataclasses.replace(config.training, total_batch_tokens=tokens),
    )


def adopted(run: PlannedRun) -> PlannedRun:
    """`run` with the batch that it was shrunk to when it began; the same where it was not."""
    if not run.fit.shrink or not run.folder.holds_run():
        return run
    before = load(run.folder.config)
    found: Config | None = run.config
    while found is not None and found.data.batch_size > before.data.batch_size:
        found = smaller(found)
    if found is None or found.data.batch_size != before.data.batch_size:
        return run
    return dataclasses.replace(run, config=found)


def train_to_fit(run: PlannedRun) -> None:
    """Train a run. If memory runs out, train with half the batch, or end in the state out_of_memory.

    `fit` in status.json lists the attempts. A resumed run keeps its batch.

    Raises:
        HeadwiseError: as `train`.
    """
    folder, config, device = run.folder, run.config, find_device(run.config.device)
    resume = folder.holds_run()
    limit_memory(run.fit.limit, device)
    tried: list[dict[str, Any]] = []
    while True:
        try:
            if run.fit.limit is not None and device.type == "cpu" and not resume:
                _refuse_above(run.fit.limit, config, device)
            train(config, resume=resume, attempt=run.attempt)
            return
        except OutOfMemory as error:
            reason = str(error)
            tried.append({"batch_size": config.data.batch_size, "peak_mb": error.peak_mb})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        less = smaller(config) if run.fit.shrink and not any(folder.checkpoints.glob("step_*")) else None
        about = {
            "wanted": tried[0]["batch_size"], "tried": tried, "measured_by": MEASURED_BY[device.type],
            "limit_mb": None if run.fit.limit is None else run.fit.limit / 1e6,
        }  # fmt: skip
        if less is None:
            if not folder.holds_run():
                folder.start(to_yaml(config))
            folder.write_status("out_of_memory", reason=reason, fit=about)
            return
        folder.refuse_outdated()
        discard(folder.path)  # what a run left that never took a whole step
        folder.write_status("planned", fit=about)
        folder.say(
            f"{reason}; starting again with data.batch_size={less.data.batch_size} and "
            f"training.total_batch_tokens={less.training.total_batch_tokens}, the same tokens per step"
        )
        config, resume = less, False


def _refuse_above(limit: int, config: Config, device: torch.device) -> None:
    """Measure two steps.

    Raises:
        OutOfMemory: they need more than `limit` bytes.
    """
    sized = with_vocabulary(config, open_data(config.data, config.seed))
    peak = training_peak(sized, device)
    if peak > limit:
        raise OutOfMemory(
            f"training needs {peak / 1e6:,.1f} MB at data.batch_size={config.data.batch_size}, and "
            f"memory_limit is {limit / 1e6:,.2f} MB ({MEASURED_BY[device.type]})",
            peak / 1e6,
        )
