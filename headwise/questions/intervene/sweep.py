"""One head at several scales of its query: what was measured, and the CSV files it is kept in.

`q_scale_intervention_results.csv` has the query-scaling study's columns, then the effects on the output;
`q_scale_intervention_samples.csv` beside it has every sample's mean max_weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from headwise.errors import HeadwiseError
from headwise.measures.spec import exported

Array = NDArray[np.float64]
Cell = float | int | str

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)
MEASURES = ("entropy", "max_weight", "k_eff")
EFFECTS = ("delta_loss", "delta_loss_ci95", "kl", "output_change")
DIRECTIONS = {"entropy": -1, "max_weight": 1, "k_eff": -1}

COLUMNS = exported(MEASURES)
"""The query-scaling study's names in CSV files, with `mean_` or `std_` before them."""

EXPECTATIONS = {
    "entropy": "decreases (the strongest effect)",
    "max_weight": "increases",
    "k_eff": "decreases (the weakest effect)",
}


@dataclass(frozen=True)
class Sweep:
    """One head's measures at S scales of its query.

    Attributes:
        head_type: `target` or `control`.
        scales: `(S,)`, increasing.
        mean, std: per measure `(S,)`, over tokens.
        n_tokens: tokens with a defined entropy.
        delta_loss: `(S,)` nats per token against the unchanged model; None where there is no loss.
        delta_loss_ci95: `(S,)` half of its 95% interval over samples; None for under two samples.
        kl: `(S,)` nats, KL(unchanged ‖ changed) of the next-token distribution; None likewise.
        output_change: `(S,)` relative change of the last hidden states, of a model without logits.
        samples: mean max_weight `(S, N)` of every sample; None in a file without them.
        samples_of: tells which samples; only gains over the same ones are paired.
    """

    layer: int
    head: int
    head_type: str
    scales: Array
    mean: dict[str, Array]
    std: dict[str, Array]
    n_tokens: int
    delta_loss: Array | None = None
    delta_loss_ci95: Array | None = None
    kl: Array | None = None
    output_change: Array | None = None
    samples: Array | None = None
    samples_of: str = ""

    @property
    def name(self) -> str:
        """`L12 H0`."""
        return f"L{self.layer} H{self.head}"


def monotonic(sweep: Sweep, tolerance: float = 1e-6) -> dict[str, bool]:
    """Per known measure, whether it never moves against the expected direction (beyond rounding)."""
    slack = {name: tolerance * max(1.0, float(np.abs(v).max())) for name, v in sweep.mean.items()}
    return {
        name: bool((np.diff(sweep.mean[name]) * direction >= -slack[name]).all())
        for name, direction in DIRECTIONS.items()
        if np.isfinite(sweep.mean[name]).all()
    }


def parse_sweeps(rows: Sequence[Mapping[str, str]], source: str) -> list[Sweep]:
    """Sweeps of a CSV with the query-scaling study's columns: one row per scale and head.

    Raises:
        HeadwiseError: a column is missing, a value is no number, or a head has under two scales.
    """
    if not rows:
        raise HeadwiseError(f"{source} holds no rows")
    missing = [c for c in ("scale", "layer", "head", "mean_max_attn") if c not in rows[0]]
    if missing:
        raise HeadwiseError(
            f"{source} has no column {missing[0]!r}; expected a file made by headwise intervene"
        )
    groups: dict[tuple[int, int, str], list[Mapping[str, str]]] = {}
    for row in rows:
        key = (
            _count(row, "layer", source),
            _count(row, "head", source),
            row.get("head_type") or "target",
        )
        groups.setdefault(key, []).append(row)
    return [_parse(key, group, source) for key, group in groups.items()]


def sweep_rows(sweep: Sweep) -> list[dict[str, Cell]]:
    """Rows of the query-scaling study's CSV, with `EFFECTS` after its columns (empty if unknown)."""
    rows: list[dict[str, Cell]] = []
    for i, scale in enumerate(sweep.scales):
        row: dict[str, Cell] = {"scale": float(scale)}
        for prefix, values in (("mean", sweep.mean), ("std", sweep.std)):
            row |= {f"{prefix}_{COLUMNS[name]}": float(values[name][i]) for name in MEASURES}
        row |= {
            "n_tokens": sweep.n_tokens,
            "layer": sweep.layer,
            "head": sweep.head,
            "head_type": sweep.head_type,
        }
        for name in EFFECTS:
            values_or_none = getattr(sweep, name)
            row[name] = "" if values_or_none is None else float(values_or_none[i])
        rows.append(row)
    return rows


def sample_rows(sweep: Sweep) -> list[dict[str, Cell]]:
    """One row per sample and scale: its mean max_weight."""
    if sweep.samples is None:
        return []
    return [
        {
            "layer": sweep.layer, "head": sweep.head, "head_type": sweep.head_type,
            "sample": n, "scale": float(scale), "mean_max_attn": float(sweep.samples[i, n]),
            "samples_of": sweep.samples_of,
        }
        for n in range(sweep.samples.shape[1])
        for i, scale in enumerate(sweep.scales)
    ]  # fmt: skip


def with_samples(sweeps: Sequence[Sweep], rows: Sequence[Mapping[str, str]], source: str) -> list[Sweep]:
    """`sweeps` with the samples that `rows` hold of them.

    Raises:
        HeadwiseError: a column is missing or a value is no number.
    """
    values: dict[tuple[int, int, str], dict[tuple[int, float], float]] = {}
    origin: dict[tuple[int, int, str], str] = {}
    for row in rows:
        key = (
            _count(row, "layer", source),
            _count(row, "head", source),
            row.get("head_type", ""),
        )
        cell = (_count(row, "sample", source), _number(row, "scale", source))
        values.setdefault(key, {})[cell] = _number(row, "mean_max_attn", source)
        origin[key] = row.get("samples_of", "")
    found = []
    for sweep in sweeps:
        key = (sweep.layer, sweep.head, sweep.head_type)
        own = values.get(key, {})
        n = 1 + max((sample for sample, _ in own), default=-1)
        n = n if n <= len(own) else 0  # with numbers left out, some sample is missing
        table = [[own.get((sample, float(scale))) for sample in range(n)] for scale in sweep.scales]
        whole = n > 0 and all(value is not None for line in table for value in line)
        samples = np.array(table, dtype=np.float64) if whole else None
        found.append(replace(sweep, samples=samples, samples_of=origin.get(key, "")))
    return found


def _parse(key: tuple[int, int, str], rows: list[Mapping[str, str]], source: str) -> Sweep:
    layer, head, head_type = key
    rows = sorted(rows, key=lambda row: _number(row, "scale", source))
    scales = np.array([_number(row, "scale", source) for row in rows])
    if np.unique(scales).size != scales.size or scales.size < 2 or scales[0] <= 0:
        listed = ", ".join(f"{s:g}" for s in scales)
        raise HeadwiseError(
            f"{source}: layer {layer} head {head} has scales {listed}; a gain needs at least two, "
            "all different and above 0"
        )

    def column(name: str) -> Array:
        return np.array([_number(row, name, source) for row in rows])

    def optional(name: str) -> Array | None:
        return column(name) if rows[0].get(name) else None

    std = {m: optional(f"std_{c}") for m, c in COLUMNS.items()}
    return Sweep(
        layer, head, head_type, scales,
        mean={m: column(f"mean_{c}") for m, c in COLUMNS.items()},
        std={m: np.full(scales.size, np.nan) if v is None else v for m, v in std.items()},
        n_tokens=_count(rows[0], "n_tokens", source) if rows[0].get("n_tokens") else 0,
        delta_loss=optional("delta_loss"),
        delta_loss_ci95=optional("delta_loss_ci95"),
        kl=optional("kl"),
        output_change=optional("output_change"),
    )  # fmt: skip


def _count(row: Mapping[str, str], column: str, source: str) -> int:
    value = _number(row, column, source)
    if not (0 <= value < 1 << 40 and value == int(value)):
        raise HeadwiseError(f"{source}: column {column} holds {row[column]!r}, which counts nothing")
    return int(value)


def _number(row: Mapping[str, str], column: str, source: str) -> float:
    try:
        return float(row[column])
    except KeyError as error:
        raise HeadwiseError(f"{source} has no column {column!r}") from error
    except (TypeError, ValueError) as error:
        raise HeadwiseError(
            f"{source}: column {column} holds {row[column]!r}, which is not a number"
        ) from error
