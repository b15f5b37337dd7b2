"""The head atlas of a profiled checkpoint: `atlas.html`, one file that works offline.

Everything shown is computed here from the profile's folder; the page only draws it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import write_text
from headwise.measures.labels import OTHER, RULES, classify
from headwise.measures.spec import FORMER_NAMES, PART, head_label, in_order, measure_of
from headwise.measures.table import MOST, read_columns, unmeasured_lines
from headwise.questions.profile.files import ProfileFile, SummaryFile
from headwise.report.atlas import about
from headwise.report.collect import finite
from headwise.report.curves import rounded
from headwise.report.html import templates

ROWS = 2_000_000
"""Rows of the table that distributions are drawn from; whole parts, spread over the profile."""
BINS = 48
_NO_MEASURE = re.compile(r"layer|head|part|(uniform|pearson|spearman)_.*")
"""Columns of per_head.csv beside the measures."""
TOP = 12
BY = {"spearman_entropy": "Spearman", "pearson_entropy": "Pearson"}
"""What heads are sorted by: the first that there is."""
POOLED = (
    "Heads here have several softmaxes, and each part is shown as a head of its own; distributions and "
    "curves against depth are of all parts together."
)
SECTIONS = {
    "kinds": "What heads do", "atlas": "Measures", "distributions": "Distributions",
    "correlations": "Query norm", "numbers": "Numbers",
}  # fmt: skip


def atlas(out: str | Path, *, rotates: bool = False) -> Path:
    """Write `out/atlas.html` from a finished profile and return its path.

    Args:
        rotates: whether the model rotates its queries and keys, so that it matters which were measured.

    Raises:
        HeadwiseError: the profile is not finished, or damaged.
    """
    from plotly.offline import get_plotlyjs

    out = Path(out)
    data = finite(collect(out, rotates=rotates))
    empty = {"kinds": not data["kinds"]["known"], "correlations": not data["correlations"]}
    sections = {key: name for key, name in SECTIONS.items() if not empty.get(key)}
    page = (
        templates()
        .get_template("profile.html.j2")
        .render(data=data, sections=sections.items(), plotly=get_plotlyjs())
    )
    write_text(out / "atlas.html", page)
    return out / "atlas.html"


def collect(out: Path, *, rotates: bool = False) -> dict[str, Any]:
    """Everything the page shows; NaN where there is no value.

    Raises:
        HeadwiseError: the profile is not finished, or damaged.
    """
    profile, summary = _json(out / "profile.json", ProfileFile), _json(out / "summary.json", SummaryFile)
    per_head = _per_head(out / "per_head.csv")
    measures = in_order(name for name in per_head if not _NO_MEASURE.fullmatch(name))
    kinds = classify(per_head)
    shown = {name: _shown(values) for name, values in per_head.items() if name != "part"}
    grids = {name: rounded(_grid(per_head, per_head[name], some), 6) for name, some in shown.items()}
    return {
        "variants": [],
        "model": profile["model"],
        "facts": _facts(profile, summary),
        "flags": _flags(summary, profile, rotates) + ([POOLED] if "part" in per_head else []),
        "measures": about(measures),
        "grids": {name: grids[name] for name in measures},
        "columns": {name: _columns(per_head, some) for name, some in shown.items()}
        if "part" in per_head
        else {},
        "kinds": {
            "known": any(kinds),
            "names": [*(rule.label for rule in RULES), OTHER],
            "grid": _label_grid(per_head, kinds),
            "columns": _columns(per_head, _labelled(kinds)) if "part" in per_head else None,
            "rules": [_rule_row(rule, per_head, kinds) for rule in RULES]
            + [[OTHER, "none of these", str(sum(k == [OTHER] for k in kinds)), "", ""]],
        },
        "distributions": _distributions(out / "heads", measures),
        "correlations": {
            name: grids[name] for name in per_head if name.startswith(("pearson_", "spearman_"))
        },
        "top": _top(per_head),
        "top_by": next((name for by, name in BY.items() if by in per_head), None),
        "numbers": _numbers(per_head, kinds, measures),
    }


def _facts(profile: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, str]]:
    data = profile["data"]
    where = {"pre_rope": "before rotation", "post_rope": "after rotation"}[profile["scores"]]
    return [
        ("Contexts", f"{summary['samples']} of {profile['context_length']} tokens"),
        ("Heads", str(summary["heads"])),
        ("Queries and keys", where),
        ("Data", str(data.get("path") or data.get("name"))),
        ("Order", "from the first" if profile["seed"] is None else f"drawn, seed {profile['seed']}"),
        ("Weights", profile["weights"]),
    ]


def _flags(summary: dict[str, Any], profile: dict[str, Any], rotates: bool) -> list[str]:
    flags = [f"{line}." for line in unmeasured_lines(summary.get("unmeasured", {}))]
    if rotates and profile["scores"] == "pre_rope":
        flags.append(
            "Logits are those before the rotation, where positions play no part, so previous-token heads "
            "do not show: profile with --scores post_rope to see what the model attends to."
        )
    if summary["layers_with_nan"]:
        layers = ", ".join(map(str, summary["layers_with_nan"]))
        flags.append(f"Measures are NaN in layer {layers}: look for NaN in the weights.")
    if summary["tokens"] < 4096:
        flags.append(f"Only {summary['tokens']} tokens were measured: means and correlations are rough.")
    if profile["aggregate"]:
        flags.append("The table has no tokens: distributions are of means per context, without Spearman.")
    return flags


def _per_head(path: Path) -> dict[str, np.ndarray]:
    try:
        rows = reading.read_csv(path, ("layer", "head"))
        if not rows:
            raise reading.Unreadable(path, "it has no heads")
        found = {
            FORMER_NAMES.get(name, name): np.array([_number(path, row, name) for row in rows])
            for name in rows[0] if name != "part"
        }  # fmt: skip
        if "part" in rows[0]:
            found["part"] = _part_names(path, rows)
        for at in (found["layer"], found["head"]):
            if not ((at >= 0) & (at < MOST) & (at == np.floor(at))).all():
                raise reading.Unreadable(path, "its layers and heads are not counted from 0")
        return found
    except reading.Unreadable as error:
        raise error.so("run the profile again to its end") from error


def _part_names(path: Path, rows: list[dict[str, str]]) -> np.ndarray:
    names = [row["part"] or "" for row in rows]
    if not all(PART.fullmatch(name) for name in names if name):
        raise reading.Unreadable(path, "its column 'part' has names that no part of a head has")
    return np.array(names)


def _number(path: Path, row: dict[str, str], name: str) -> float:
    try:
        return float(row[name] or "nan")
    except ValueError:
        raise reading.Unreadable(path, f"column {name} has {row[name][:40]!r}, which is no number") from None


def _shown(values: np.ndarray) -> np.ndarray:
    """Which heads, or parts of heads, a grid of `values` has: those with a value; all where none has one."""
    known = np.isfinite(values)
    return known if known.any() else np.ones(len(values), dtype=bool)


def _labelled(kinds: list[list[str]]) -> np.ndarray:
    return _shown(np.array([1.0 if labels else np.nan for labels in kinds]))


def _heads(per_head: dict[str, np.ndarray], some: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """The column of each head in a grid, and what each column stands for: a head, or a part of one."""
    if "part" not in per_head:
        heads = per_head["head"].astype(int)
        return heads, [(head, "") for head in range(heads.max() + 1)]
    every = list(zip(per_head["head"].astype(int).tolist(), per_head["part"].tolist(), strict=True))
    columns = sorted({at for at, chosen in zip(every, some, strict=True) if chosen})
    place = {at: n for n, at in enumerate(columns)}
    return np.array([place.get(at, -1) for at in every]), columns


def _columns(per_head: dict[str, np.ndarray], some: np.ndarray) -> list[str]:
    return [head_label(*at) for at in _heads(per_head, some)[1]]


def _layers(per_head: dict[str, np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """Row of each head in a grid, and the layer that each row stands for."""
    layers = sorted({int(layer) for layer in per_head["layer"]})
    return np.searchsorted(layers, per_head["layer"]), layers


def _grid(per_head: dict[str, np.ndarray], values: np.ndarray, some: np.ndarray) -> np.ndarray:
    (rows, layers), (at, columns) = _layers(per_head), _heads(per_head, some)
    grid = np.full((len(layers), len(columns)), np.nan)
    grid[rows[at >= 0], at[at >= 0]] = values[at >= 0]
    return grid


def _label_grid(per_head: dict[str, np.ndarray], kinds: list[list[str]]) -> dict[str, Any]:
    (rows, layers), (places, columns) = _layers(per_head), _heads(per_head, _labelled(kinds))
    cells: list[list[list[str] | None]] = [[None] * len(columns) for _ in layers]
    for row, at, labels in zip(rows, places, kinds, strict=True):
        if at >= 0:
            cells[row][at] = labels or None
    return {"layers": layers, "cells": cells}


def _head_of(per_head: dict[str, np.ndarray], row: int) -> str:
    """How the head of a row of per_head.csv is shown."""
    part = str(per_head["part"][row]) if "part" in per_head else None
    return head_label(int(per_head["head"][row]), part)


def _rule_row(rule: Any, per_head: dict[str, np.ndarray], kinds: list[list[str]]) -> list[str]:
    """Label, rule, heads it names, heads it holds for, and the clearest of them."""
    named = sum(labels[:1] == [rule.label] for labels in kinds)
    holding = [head for head, labels in enumerate(kinds) if rule.label in labels]
    clearest = ""
    if holding:
        values = per_head[rule.measure][holding]
        best = holding[int(np.argmax(values) if rule.above else np.argmin(values))]
        place = f"L{int(per_head['layer'][best])} H{_head_of(per_head, best)}"
        clearest = f"{place}: {rule.measure} {per_head[rule.measure][best]:.3g}"
    return [rule.label, rule.text, str(named), str(len(holding)), clearest]


def _distributions(folder: Path, measures: list[str]) -> dict[str, Any]:
    """Per measure, bin edges and the share of each layer's known values in each bin, `(L, BINS)`."""
    parts = sorted(folder.glob("*.parquet"))
    values, layers = _some_rows(folder, parts, measures)
    found: dict[str, Any] = {"rows": len(layers), "measures": {}}
    distinct = np.unique(layers)
    for name in measures:
        column = values[name]
        known = column[np.isfinite(column)]
        if not known.size:
            continue
        low, high = np.quantile(known[:: max(1, known.size // 200_000)], (0.001, 0.999))
        high = high if high > low else low + max(abs(low), 1.0) * 0.01
        edges = np.linspace(low, high, BINS + 1)
        counts = np.stack([np.histogram(column[layers == n], edges)[0] for n in distinct])
        with np.errstate(invalid="ignore"):
            shares = counts / counts.sum(1, keepdims=True)  # NaN where a layer has no value
        found["measures"][name] = {"edges": rounded(edges, 6), "shares": rounded(shares, 5)}
    return found | {"layers": distinct.tolist()}


def _some_rows(
    folder: Path, parts: list[Path], measures: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of a few parts that lie evenly over all of them, thinned to about ROWS."""
    import pyarrow.parquet as pq

    from headwise.questions.profile.parts import check_parts

    if not parts:
        raise HeadwiseError(f"no head table in {folder}: it holds no .parquet part; run the profile again")
    check_parts(parts)
    per_part = max(1, pq.ParquetFile(parts[0]).metadata.num_rows)
    count = min(len(parts), max(1, ROWS // per_part))
    tables = [read_columns(parts[n * len(parts) // count], ["layer", *measures]) for n in range(count)]
    step = max(1, per_part * count // ROWS)
    step += step % 2 == 0  # an odd step does not keep to every other token or head
    columns = {
        name: np.concatenate([table[name].to_numpy()[::step] for table in tables])
        for name in ("layer", *measures)
    }
    layers = columns.pop("layer")
    return {name: column.astype(np.float32) for name, column in columns.items()}, layers


def _top(per_head: dict[str, np.ndarray]) -> list[list[str]]:
    """Heads whose query norm goes with entropy most, by |r|: the query-scaling study's targets."""
    best = next((n for n in BY if n in per_head), None)
    if best is None:
        return []
    columns = [n for n in per_head if n.startswith(("pearson_", "spearman_"))]
    order = np.argsort(-np.abs(np.nan_to_num(per_head[best])), kind="stable")
    if "part" in per_head:
        order = order[np.isfinite(per_head[best][order])]
    order = order[:TOP]
    header = ["layer", "head", *(n.replace("_", " ", 1).replace("_", " ") for n in columns)]
    cells = [
        [
            str(int(per_head["layer"][i])),
            _head_of(per_head, int(i)),
            *(f"{per_head[n][i]:+.3f}" for n in columns),
        ]
        for i in order
    ]
    return [header, *cells]


def _numbers(per_head: dict[str, np.ndarray], kinds: list[list[str]], measures: list[str]) -> list[list[str]]:
    rows = [["layer", "head", "kind", *(measure_of(m).label for m in measures)]]
    for i, labels in enumerate(kinds):
        place = [str(int(per_head["layer"][i])), _head_of(per_head, i)]
        cells = [f"{per_head[m][i]:.4g}" for m in measures]
        if "part" in per_head:  # what a part has, the whole has not, and the other way round
            cells = ["" if cell == "nan" else cell for cell in cells]
        rows.append([*place, ", ".join(labels), *cells])
    return rows


def _json(path: Path, schema: Any) -> dict[str, Any]:
    try:
        return reading.read_json(path, schema)
    except reading.Unreadable as error:
        raise error.so("run the profile to its end first") from error
