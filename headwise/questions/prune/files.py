"""`prune.json`, which `headwise prune` leaves beside the pruned model, and `prune_results.csv`."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.runs.folder import known_format

RECORD = "prune.json"
RESULTS = "prune_results.csv"
FORMAT = 1

Place = Annotated[int, Meta(ge=0, lt=2**16)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Removed = Annotated[list[tuple[Place, Place]], Meta(max_length=1_000_000)]


class Interval(TypedDict):
    """A mean, half the width of its 95% interval, and of how many."""

    mean: float | None
    ci95: float | None
    n: Count


class Change(TypedDict):
    """Losses in nats per token; `delta` is paired over sequences."""

    before: float
    after: float
    delta: Interval
    perplexity_before: float
    perplexity_after: float


class Draw(Change):
    """One random removal."""

    removed: Removed


class Speed(TypedDict):
    """Forward passes; the speed-up is the geometric mean over paired passes, with its 95% interval."""

    tokens_per_sec_before: float
    tokens_per_sec_after: float
    speedup: float
    interval: tuple[float, float] | None
    passes: Count


class Against(TypedDict):
    """The removal against the random ones; below 0 it costs less, and than so many of them."""

    delta: Interval
    over_draws: Interval
    over_sequences: Interval
    costs_less_than: Count
    verdict: str


class Law(TypedDict):
    """Spearman's rank correlation of a measure with the importance of heads."""

    measure: str
    n: Count
    rho: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None


class Head(TypedDict):
    """One head: the measure it was ranked by, and the rise of the loss without it."""

    layer: Place
    head: Place
    value: float | None
    importance: float


class Pruning(TypedDict):
    """`prune.json`."""

    format: Count
    model: str
    mode: str
    by: str
    fraction: float
    per_layer: bool
    zeroed: bool
    seed: Count
    evaluations: Count | None
    n_sequences: Count
    context_length: Count
    n_heads: Count
    unit: Count
    removed: Removed
    heads_by_layer: list[tuple[Place, Place]]
    logit_change: float
    loss: Change
    speed: Speed
    params: tuple[Count, Count]
    flops_per_token: tuple[Count | None, Count | None]
    draws: Annotated[list[Draw], Meta(max_length=10_000)]
    against_random: Against | None
    law: list[Law]
    heads: Annotated[list[Head], Meta(max_length=1_000_000)]


def read(path: Path) -> dict[str, Any] | None:
    """The record at `path`; None where there is none.

    Raises:
        HeadwiseError: it is damaged, or of a newer headwise.
    """
    try:
        found: dict[str, Any] = reading.read_json(path, Pruning, accept=known_format(path, known=FORMAT))
        return found
    except reading.Missing:
        return None
    except reading.Unreadable as error:
        raise HeadwiseError(f"{error}; delete it and prune again") from error


COLUMNS = (
    "model", "mode", "by", "fraction", "per_layer", "zeroed", "heads", "heads_removed",
    "loss_before", "loss_after", "delta", "delta_ci95", "ppl_before", "ppl_after",
    "tokens_per_sec_before", "tokens_per_sec_after", "seed", "draw", "removed",
)  # fmt: skip


def results_csv(records: list[dict[str, Any]]) -> str:
    """A row for each removal, the random ones after the one they are the control of.

    The speed of a random removal is not measured: it takes as many heads, so its cells are empty.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records:
        speed = {name: record["speed"][name] for name in COLUMNS if name in record["speed"]}
        writer.writerow(_row(record, record["loss"], record["removed"]) | speed)
        for number, draw in enumerate(record["draws"]):
            writer.writerow(
                _row(record, draw, draw["removed"]) | {"mode": "random", "by": "", "draw": number}
            )
    return text.getvalue()


def _row(record: dict[str, Any], change: dict[str, Any], removed: Any) -> dict[str, Any]:
    same = ("model", "mode", "by", "fraction", "per_layer", "zeroed", "seed")
    return {name: record[name] for name in same} | {
        "heads": record["n_heads"], "heads_removed": len(removed),
        "loss_before": change["before"], "loss_after": change["after"], "delta": change["delta"]["mean"],
        "delta_ci95": change["delta"]["ci95"], "ppl_before": change["perplexity_before"],
        "ppl_after": change["perplexity_after"],
        "removed": " ".join(f"{layer}.{head}" for layer, head in removed),
    }  # fmt: skip
