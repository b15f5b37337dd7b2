"""The measures of each head before any is removed, by which heads are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwise.config.training import EntanglementConfig
from headwise.errors import HeadwiseError, one_of
from headwise.measures.spec import KEYS, WINDOW_MEASURES, in_order, measure_of, measures
from headwise.questions.prune.text import Sequences
from headwise.runs.folder import RunFolder
from headwise.runs.read import Run, Unreadable
from headwise.runs.weights import find_checkpoint
from headwise.watch import watch
from headwise.watch.effect import Speaker
from headwise.watch.hooks import Layer
from headwise.watch.windows import draw_windows, measure_windows

IMPORTANCE = "importance"
"""The loss without the head minus the loss with all heads, by which heads can be ranked too."""

Heads = dict[tuple[int, int], float]
"""A value for each (layer, head)."""


def refuse_unknown(by: str) -> None:
    """Refuse a measure that nothing here defines.

    Raises:
        HeadwiseError: names the nearest.
    """
    one_of("--by", by, (*measures(), *WINDOW_MEASURES, IMPORTANCE))


def recorded(folder: Path, last: int) -> dict[str, Heads]:
    """Every measure of a run's heads, the mean over the last evaluations up to its checkpoint.

    The measures of the head table and of windows, each over its own last `last` evaluations, and importance
    where the run measured it.

    Raises:
        HeadwiseError: a table is damaged, or the run has no checkpoint.
    """
    run = Run(folder)
    step = int(find_checkpoint(RunFolder(folder)).name.removeprefix("step_"))
    found: dict[str, Heads] = {}
    try:
        for frame in (run.heads, run.entanglement):
            if frame is not None:
                found |= _means(frame, last, step)
    except Unreadable as error:
        raise HeadwiseError(f"{folder}: {error}") from error
    rises = (run.summary.get(IMPORTANCE) or {}).get("delta_loss") if not run.problem else None
    if rises:
        found[IMPORTANCE] = {(i, h): float(v) for i, layer in enumerate(rises) for h, v in enumerate(layer)}
    return found


def _means(frame: Any, last: int, step: int) -> dict[str, Heads]:
    """Means over the tokens, samples and evaluations that have a value."""
    import polars as pl

    frame = frame.drop_nulls(["step", "layer", "head"]).filter(pl.col("step") <= step)
    steps = frame["step"].unique().sort().tail(last)
    frame = frame.filter(pl.col("step").is_in(steps.to_list()))
    found: dict[str, Heads] = {}
    for name in in_order(column for column in frame.columns if column not in KEYS):
        values = frame[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        known = np.isfinite(values) if measure_of(name).absent is not None else ~np.isnan(values)
        rows = (
            frame.select("layer", "head").filter(pl.Series(known)).with_columns(pl.Series("v", values[known]))
        )
        means = rows.group_by("layer", "head").agg(pl.col("v").mean())
        if means.height:
            found[name] = {(layer, head): v for layer, head, v in means.iter_rows()}
    return found


def measured_now(speaker: Speaker, by: str, sequences: Sequences, batch_size: int, seed: int) -> Heads:
    """One measure of every head of a model, on `sequences`.

    Raises:
        HeadwiseError: the model's layers do not offer it; says why.
    """
    model = speaker.loaded.model
    if by in WINDOW_MEASURES:
        options = EntanglementConfig()
        window = min(options.window, sequences.inputs.shape[1])
        windows = draw_windows(sequences.inputs, window, options.n_windows, seed)
        regions = min(options.n_regions, window)
        columns, reasons = measure_windows(model, speaker, windows, n_regions=regions)
    else:
        with watch(model, measures=[by]) as seen:
            for inputs, _ in sequences.batches(batch_size):
                speaker(inputs)
        columns, reasons = seen.columns(), seen.reasons
    if by not in columns:
        why = next(iter(reasons.values()), "no layer offers it")
        raise HeadwiseError(f"{by} of {speaker.loaded.name} cannot be measured: {why}")
    keys = zip(columns["layer"].tolist(), columns["head"].tolist(), strict=True)
    return dict(zip(keys, columns[by].tolist(), strict=True))


def must_be_known(found: Heads, by: str, layers: Sequence[Layer], name: str) -> None:
    """Refuse a ranking with a head that has no value.

    Raises:
        HeadwiseError: names the first such head.
    """
    for layer in layers:
        for head in range(layer.n_heads):
            if not np.isfinite(found.get((layer.number, head), np.nan)):
                raise HeadwiseError(
                    f"head {head} of layer {layer.number} of {name} has no {by}; rank by another measure "
                    "with --by"
                )
    extra = set(found) - {(layer.number, head) for layer in layers for head in range(layer.n_heads)}
    if extra:
        raise HeadwiseError(
            f"the {by} that {name} recorded is of other heads than its model has (layer {min(extra)[0]} head "
            f"{min(extra)[1]}); measure it now with --last 0"
        )
