"""The head atlas: every measure of every head over training, and the tables at its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.analysis.statistics import summarize
from headwise.measures.spec import KEYS, head_label, in_order, measure_of
from headwise.report.curves import rounded, thin
from headwise.runs.read import Run, Unreadable

if TYPE_CHECKING:
    import polars

MAX_STEPS = 40


def grid(run: Run) -> dict[str, Any] | None:
    """One run's head table as arrays `(S, L, H)` over evaluation steps, layers and heads.

    Values are means over tokens and samples that have one; a head without a value is NaN. Where heads have
    several softmaxes, each part is a column of its own, and `columns` has the head and part of each, by
    measure; otherwise there is no `columns`. None where the run wrote no table. Raises `Unreadable` where it
    is damaged.
    """
    return None if run.heads is None else grid_of(run.heads)


def grid_of(frame: polars.DataFrame) -> dict[str, Any] | None:
    """The same of any table in the form of the head table."""
    import polars as pl

    measures = in_order(name for name in frame.columns if name not in KEYS)
    try:
        means = [_known(pl.col(m).cast(pl.Float64), m).mean() for m in measures]
        rows = frame.drop_nulls(["layer", "head"]).group_by("step", "layer", "head", "part").agg(means)
    except pl.exceptions.PolarsError as error:
        raise Unreadable(f"unreadable heads: {str(error).splitlines()[0]}") from error
    if not rows.height or rows["step"].null_count() == rows.height:
        return None
    rows = rows.drop_nulls("step")
    steps = thin(np.sort(rows["step"].unique().to_numpy()), MAX_STEPS)
    rows = rows.filter(pl.col("step").is_in(steps.tolist()))
    if rows["part"].null_count() < rows.height:
        return {"steps": steps} | _in_parts(rows, steps, measures)
    shape = (steps.size, int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1)  # type: ignore[arg-type]
    at = (np.searchsorted(steps, rows["step"]), rows["layer"].to_numpy(), rows["head"].to_numpy())
    arrays = {}
    for name in measures:
        if rows[name].null_count() < rows.height:
            arrays[name] = np.full(shape, np.nan)
            arrays[name][at] = rows[name].to_numpy()
    return {"steps": steps, "measures": arrays}


Column = tuple[int, str]
"""A head, and a part of it; empty for the whole head."""


def _in_parts(rows: polars.DataFrame, steps: np.ndarray, measures: list[str]) -> dict[str, Any]:
    """`measures` and `columns` of a table whose heads have parts: a measure has the columns that have it."""
    import polars as pl

    arrays: dict[str, np.ndarray] = {}
    columns: dict[str, list[Column]] = {}
    n_layers = int(rows["layer"].max()) + 1  # type: ignore[arg-type]
    for name in measures:
        own = rows.filter(pl.col(name).is_not_null())
        if not own.height:
            continue
        places = list(zip(own["head"].to_list(), own["part"].fill_null("").to_list(), strict=True))
        columns[name] = sorted(set(places))
        index = {place: n for n, place in enumerate(columns[name])}
        arrays[name] = np.full((steps.size, n_layers, len(index)), np.nan)
        at = (np.searchsorted(steps, own["step"]), own["layer"].to_numpy(), [index[p] for p in places])
        arrays[name][at] = own[name].to_numpy()
    return {"measures": arrays, "columns": columns}


def columns_of(found: dict[str, Any], name: str) -> list[Column]:
    """What the columns of a measure in a grid stand for."""
    if "columns" in found:
        columns: list[Column] = found["columns"][name]
        return columns
    return [(head, "") for head in range(found["measures"][name].shape[-1])]


def labels_of(found: dict[str, Any]) -> dict[str, Any]:
    """The same as pages show it, by measure; nothing where heads have no parts."""
    if "columns" not in found:
        return {}
    return {
        "columns": {name: [head_label(*at) for at in found["columns"][name]] for name in found["columns"]}
    }


def _known(column: polars.Expr, name: str) -> polars.Expr:
    """The column with null where a token, or a head, has no value."""
    import polars as pl

    known = column.fill_nan(None)
    return known if measure_of(name).absent is None else pl.when(known.is_finite()).then(known)


def about(names: Iterable[str]) -> list[dict[str, str]]:
    """What pages say of each measure, in the order of the head table."""
    return [
        {"name": m.name, "label": m.label, "definition": m.definition, "unit": m.unit}
        for m in map(measure_of, in_order(names))
    ]


def atlas(grids: dict[str, list[tuple[Run, bool, dict[str, Any]]]]) -> dict[str, Any]:
    """Everything the atlas shows, ready for JSON.

    Args:
        grids: variant -> [(run, whether it may be averaged, its `grid`)].

    Seeds stay apart: head 3 of one seed has nothing to do with head 3 of another.
    """
    present = {name for runs in grids.values() for _, _, found in runs for name in found["measures"]}
    return {
        "measures": about(sorted(present)),
        "variants": {
            variant: [
                {"seed": run.seed, "used": used, "state": run.state, "steps": found["steps"].tolist(),
                 "measures": {m: rounded(array) for m, array in found["measures"].items()},
                 **labels_of(found)}
                for run, used, found in runs
            ]
            for variant, runs in grids.items()
        },
    }  # fmt: skip


def per_head(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The per-head metrics study's table: a head's mean over layers at the last evaluation, over seeds.

    A part of a head has a row of its own, with its `part`.
    """
    return _table(found, lambda last: {(h,): _mean(last[:, h]) for h in range(last.shape[1])}, ("head",))


def per_layer_head(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The same for each layer and head."""
    return _table(found, lambda last: {tuple(map(int, at)): last[at] for at in np.ndindex(*last.shape)},
                  ("layer", "head"))  # fmt: skip


def _table(found: list[dict[str, Any]], cells: Any, keys: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    tables = {}
    for measure in in_order(sorted({name for f in found for name in f["measures"]})):
        columns = [
            {(*at[:-1], columns_of(f, measure)[at[-1]]): value
             for at, value in cells(f["measures"][measure][-1]).items()}
            for f in found if measure in f["measures"]
        ]  # fmt: skip
        rows = []
        for at in sorted({at for column in columns for at in column}):
            values = [float(column[at]) for column in columns if at in column and np.isfinite(column[at])]
            if values:
                summary = summarize(values)
                numbers = {"mean": summary.mean, "std": summary.std, "ci95": summary.ci95, "n": summary.n}
                head, part = at[-1]
                place = dict(zip(keys, (*at[:-1], head), strict=True)) | ({"part": part} if part else {})
                rows.append(place | numbers)
        if rows:
            tables[measure] = rows
    return tables


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
