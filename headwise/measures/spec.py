"""Every measure of a head, written once: what it is, how it is named, and how its means are taken.

The head table's columns, the collector, profiles, reports and docs/measures.md read what is here.
A package with an attention kind of its own adds to it in one of two ways:

    class Mine(Attention):                       # the kind's class lists them, or
        measures = (Measure("surprise", "Surprise", "Σ p |v|", "", source="layer"),)

    register_measure(Measure("surprise", …))     # the module does, when it is imported

The layer hands the values over in `extra` of its observation, by name, each `(B, H, T)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from headwise.errors import HeadwiseError, one_of

Source = Literal["weights", "logits", "query", "margins", "taken", "layer"]

SOURCES: dict[Source, str] = {
    "weights": "attention weights",
    "logits": "logits of a softmax",
    "query": "queries before their rotation",
    "margins": "margins of maxima over keys",
    "taken": "queries that mask keys (F)",
    "layer": "the layer itself",
}
"""What a measure is taken of; a layer that does not offer it has no such measure.

`weights` are known of the observations Scores and Weights, `logits`, `query` and `taken` of Scores,
`margins` of Margins, and `layer` of any that carries the measure in `extra`.
"""

KEYS = {
    "run": "string", "step": "int64", "sample": "int64",
    "layer": "int32", "head": "int32", "part": "string", "token": "int32",
}  # fmt: skip
"""Key columns of the head table and their types.

`part` names one of several softmaxes of a head; null, or not there at all, for measures of the whole head.
"""

PART = re.compile(r"[a-z0-9]{1,16}")
"""What a part can be called."""


def head_label(head: int, part: str | None = None) -> str:
    """How a head, or one of its parts, is shown: `3`, `3 part 1`."""
    return f"{head} part {part}" if part else str(head)


@dataclass(frozen=True)
class Measure:
    """One measure of a head, per query.

    Attributes:
        name: its column in the head table: lower-case letters, digits and underscores.
        label: its name in figures and on pages.
        definition: its formula, as text.
        unit: the unit; empty where it has none.
        source: what it is taken of; see `SOURCES`.
        needs_context: it means little for a query that sees few keys: the first `ignore_first`
            tokens of a document have NaN in tables of tokens and are left out of means.
        absent: what marks a query without this measure, and is left out of means: +inf, -inf or NaN;
            None where every query has one. A NaN that does not mark absence is never left out: it shows
            damage.
        correlated: its correlation with `CORRELATED_WITH` over tokens is kept.
        remark: what else there is to know about its number.
        table: title and column of its own table by head in reports (per-head metrics study); None = none.
        least_of: the measure whose smallest value over all tokens of a head this is. Tables of tokens have no
            such column; in tables of heads it stands where others are means.
        export_name: its column in the query-scaling study's CSV files; None = it has none.
    """

    name: str
    label: str
    definition: str
    unit: str = ""
    source: Source = "weights"
    needs_context: bool = False
    absent: float | None = None
    correlated: bool = False
    remark: str = ""
    table: tuple[str, str] | None = None
    least_of: str | None = None
    export_name: str | None = None

    @property
    def label_with_unit(self) -> str:
        """`Entropy (nats)`."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def has_value(self, values: Any) -> Any:
        """Where `values` (an array or tensor) are not `absent`, of a measure that can be."""
        if self.absent is None or math.isnan(self.absent):
            return values == values  # NaN differs from itself
        return values != self.absent


CORRELATED_WITH = "query_norm"
"""The measure whose correlation with others is kept (the query-scaling study chose its target head by it)."""

MEASURES: dict[str, Measure] = {}
"""Built-in and registered measures, in the order of the table's columns."""

WINDOW_MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(
            "entanglement", "Entanglement entropy",
            "-Σ p ln p with p = λ²/Σλ² of the singular values λ of the W x W weights of a window", "nats",
        ),
        Measure(
            "regional_entanglement", "Regional entanglement",
            "mean over regions r of the window's queries of -tr ρ ln ρ with ρ = A_r A_rᵀ / tr", "nats",
        ),
        Measure(
            "sparsity", "Sparsity",
            "mean over queries i > 1 of a window of 1 - k_eff_i / i: the share of the keys up to the query "
            "that 0.9 of the weight does without",
        ),
    )
}  # fmt: skip
"""What is measured of a whole window of tokens and not of a query: `measure.entanglement`."""

FORMER_NAMES = {"memory": "kept_context"}
"""Columns of older tables under another name than today's."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_OTHER_COLUMNS = re.compile(r"(pearson|spearman|uniform)_.*")


def register_measure(measure: Measure) -> Measure:
    """Add a measure to the head table's columns; the same measure again changes nothing.

    Raises:
        HeadwiseError: its name cannot be a column or belongs to another measure, its source is unknown, or
            `absent` could be a value.
    """
    name, known = measure.name, MEASURES.get(measure.name)
    if known is not None and known != measure:
        raise HeadwiseError(f"measure {name!r} is registered already with another definition; rename one")
    if (
        not _NAME.fullmatch(name)
        or _OTHER_COLUMNS.fullmatch(name)
        or name in (*KEYS, *FORMER_NAMES, *WINDOW_MEASURES)
    ):
        raise HeadwiseError(
            f"measure {name!r} cannot be a column: a name has lower-case letters, digits and underscores, "
            f"does not begin with pearson_, spearman_ or uniform_, and is none of "
            f"{', '.join((*KEYS, *FORMER_NAMES, *WINDOW_MEASURES))}"
        )
    one_of(f"source of measure {name!r}", measure.source, SOURCES)
    if measure.absent is not None and math.isfinite(measure.absent):
        raise HeadwiseError(
            f"measure {name!r} marks queries without it by {measure.absent}, which could be a value; "
            "mark them by inf, -inf or nan"
        )
    return MEASURES.setdefault(name, measure)


def measures() -> dict[str, Measure]:
    """Every measure by name: built in, registered, and listed by a registered kind of attention."""
    return dict(MEASURES)


def measure_of(name: str) -> Measure:
    """The measure of a column; of a column that nothing here knows, one that is named like it."""
    if name in MEASURES or name in WINDOW_MEASURES:
        return MEASURES.get(name) or WINDOW_MEASURES[name]
    return Measure(name, name, "not defined by what is loaded here", source="layer", absent=math.inf)


def wanted_measures(names: Iterable[str] | None) -> tuple[str, ...]:
    """The given names in the order of the head table; those of all measures for None.

    Raises:
        HeadwiseError: a name is not a measure; the message has the nearest. Or there are none.
    """
    known = measures()
    if names is None:
        return tuple(known)
    given = {one_of("measure", FORMER_NAMES.get(name, name), known) for name in names}
    if not given:
        raise HeadwiseError(f"no measure is given; choose from {', '.join(known)}")
    return tuple(name for name in known if name in given)


def in_order(columns: Iterable[str]) -> list[str]:
    """Names of measures in the order of the head table; unknown ones last, as they come."""
    given, known = list(dict.fromkeys(columns)), measures()
    return [name for name in known if name in given] + [name for name in given if name not in known]


def correlated(names: Iterable[str]) -> list[str]:
    """`CORRELATED_WITH` and those of `names` whose correlation with it is kept; nothing without either."""
    names = list(names)
    found = [name for name in names if measure_of(name).correlated]
    return [CORRELATED_WITH, *found] if CORRELATED_WITH in names and found else []


def exported(names: Iterable[str]) -> dict[str, str]:
    """Those measures that the query-scaling study's CSV files have, by their column there."""
    found = {name: measure_of(name).export_name for name in names}
    return {name: column for name, column in found.items() if column is not None}


def measure_table() -> str:
    """The table of docs/measures.md."""
    lines = ["| column | shown as | definition | unit | taken of |", "| --- | --- | --- | --- | --- |"]
    for measure in measures().values():
        words = [measure.definition, measure.remark]
        words += ["left out for the first `ignore_first` tokens"] if measure.needs_context else []
        cells = [f"`{measure.name}`", measure.label, "; ".join(filter(None, words)), measure.unit]
        cells = [cell.replace("|", "\\|") for cell in (*cells, SOURCES[measure.source])]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


for _measure in (
    Measure(
        "entropy", "Entropy", "-Σ p ln p", "nats", needs_context=True, correlated=True,
        table=("attention_entropy (per head)", "entropy"), export_name="entropy",
    ),
    Measure("max_weight", "Largest weight", "max_j p_j", correlated=True, export_name="max_attn"),
    Measure(
        "k_eff", "Effective keys", "fewest keys whose largest weights sum to at least 0.9", "keys",
        correlated=True, remark="exact: the answer of a full sort, mass 0.9", export_name="k_eff",
    ),
    Measure(
        "query_norm", "Query norm", "‖q_i‖₂ before RoPE", source="query", export_name="query_norm",
        remark="after `qk_norm` where that is on",
    ),
    Measure("logit_mean", "Logit mean", "mean of s[i,j] over visible keys", source="logits"),
    Measure("logit_std", "Logit std", "standard deviation of s[i,j] over visible keys", source="logits"),
    Measure("logit_max", "Largest logit", "max_j s[i,j] over visible keys", source="logits"),
    Measure(
        "log_sum_exp", "Log-sum-exp of logits", "ln Σ_j exp(s[i,j]) over visible keys", "nats",
        source="logits", remark="without a bias that is added to the logits, and without a sink",
    ),
    Measure("sink_weight", "Weight on the first token", "weight on the first key"),
    Measure("self_weight", "Weight on itself", "weight on key i"),
    Measure("previous_weight", "Weight on the previous token", "weight on key i-1"),
    Measure("mean_distance", "Mean distance", "Σ p_j |i-j|", "tokens"),
    Measure(
        "kept_context", "Kept context", "Σ_j (1 - min(F[i,j], 1)), what selection leaves of the keys", "keys",
        source="taken",
    ),
    Measure(
        "null_weight", "Weight on nothing", "what a sink c takes, exp(c) / (exp(c) + Σ_j exp(s[i,j]))",
        source="layer", remark="other measures are of the weights over the keys, normalised to 1",
    ),
    Measure("gate", "Gate", "mean of the head's output gate over its channels", source="layer"),
):  # fmt: skip
    register_measure(_measure)
