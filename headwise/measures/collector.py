"""Measure what attention layers offer: from an observation of a layer to rows of the head table.

`measure` turns one observation of one layer into measures, and `Collector` gathers them over layers
and forward passes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from headwise.attention.observation import (
    Margins,
    Observation,
    Scores,
    Unmeasured,
    Values,
    Weights,
    by_part,
)
from headwise.errors import HeadwiseError
from headwise.functional.head_stats import document_starts, head_stats, weights_stats
from headwise.functional.sharing import kept_context
from headwise.measures.means import counted, without_early
from headwise.measures.spec import measure_of
from headwise.measures.spec import measures as all_measures

ScoresFrom = Literal["post_rope", "pre_rope"]
SCORES = ("post_rope", "pre_rope")
IGNORE_FIRST = 2
"""First tokens that see too few keys for measures that need a context (query-scaling study)."""


def measure(
    observation: Observation,
    *,
    scores: ScoresFrom = "post_rope",
    measures: Iterable[str] | None = None,
    k_eff: bool = True,
) -> dict[str, Tensor]:
    """Measure one layer, or one part of its heads.

    Args:
        observation: what the layer offers; an `Unmeasured` layer gives no measures, and neither does one of
            parts, of which `by_part` gives each.
        scores: whether logits come from q, k after the rotation or before it. `query_norm` is
            always taken before.
        measures: which columns of the head table; default all that the observation can give.
        k_eff: False leaves out `k_eff`, the costliest.

    Returns:
        Column name to a float tensor `(B, H, T)`.
    """
    wanted = set(all_measures() if measures is None else measures)
    if not k_eff:
        wanted.discard("k_eff")
    if isinstance(observation, Unmeasured):
        return {}
    found: dict[str, Tensor] = {}
    if isinstance(observation, Margins):
        found = {"margin": observation.margin}
    elif isinstance(observation, Weights):
        found = weights_stats(
            observation.weights, key_mask=observation.key_mask, documents=observation.documents,
            k_eff="k_eff" in wanted,
        ).columns()  # fmt: skip
    elif isinstance(observation, Scores):
        found = _measure_scores(observation, scores, wanted)
    found |= _handed_over(observation, found, wanted)
    of_least = {name: found.get(measure_of(name).least_of or "") for name in wanted}
    found |= {name: value for name, value in of_least.items() if value is not None}
    return {name: value for name, value in found.items() if name in wanted}


def _measure_scores(seen: Scores, scores: ScoresFrom, wanted: set[str]) -> dict[str, Tensor]:
    before = seen.q if seen.q_pre is None else seen.q_pre
    held = {}
    if seen.taken is not None and "kept_context" in wanted:
        held["kept_context"] = kept_context(seen.taken).expand(seen.q.shape[:3])
    if not any(measure_of(name).source in ("weights", "logits") for name in wanted):
        return {"query_norm": _norm(before)} | held
    q, k = seen.q, seen.k
    if scores == "pre_rope" and seen.q_pre is not None and seen.k_pre is not None:
        q, k = seen.q_pre, seen.k_pre
    stats = head_stats(
        q, k, causal=seen.causal, scale=seen.scale, bias=seen.bias, window=seen.window,
        softcap=seen.softcap, key_mask=seen.key_mask, documents=seen.documents, sink=seen.sink,
        k_eff="k_eff" in wanted,
    )  # fmt: skip
    found = stats.columns()
    if before is not q and "query_norm" in wanted:
        found["query_norm"] = _norm(before)
    return found | held


def _norm(q: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(q.detach(), dim=-1, dtype=torch.float32)
    return norm


def _handed_over(observation: Observation, found: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """The measures that the layer computes itself, `(B, H, T)` by name; those of functions if wanted."""
    extra, known = getattr(observation, "extra", {}), all_measures()
    like = next(iter(found.values()), None)
    handed: dict[str, Tensor] = {}
    for name, value in extra.items():
        if name not in known:
            raise HeadwiseError(
                f"an attention layer hands over the measure {name!r}, which is not registered; list it in "
                "`measures` of the layer's kind, or call register_measure"
            )
        if callable(value):
            if name not in wanted:
                continue
            value = value()
        if value.dim() != 3 or (like is not None and value.shape != like.shape):
            expected = "(B, H, T)" if like is None else str(tuple(like.shape))
            raise HeadwiseError(
                f"an attention layer hands over the measure {name!r} of shape {tuple(value.shape)}; "
                f"expected {expected}"
            )
        handed[name] = value
    return handed


Place = tuple[int, str]
"""A layer, and a part of its heads; empty for whole heads."""


@dataclass
class Rows:
    """The measures of one layer in one forward pass.

    Attributes:
        values: column name to `(B, H, T)` float32.
        real: `(B, T)`, False at padding tokens, which have no rows; None = all are real.
        uniform: what uniform attention would give, padding and additive masks aside: the mean
            number of keys that a query sees, and their mean distance.
    """

    values: dict[str, Tensor]
    real: Tensor | None
    uniform: tuple[float, float]


@dataclass
class _Sums:
    names: list[str]
    total: Tensor
    count: Tensor
    least: Tensor


@dataclass
class Collector:
    """Gathers measures over layers and forward passes into columns of the head table.

    Attributes:
        measures: the columns to gather.
        scores: `post_rope` or `pre_rope`.
        per_token: keep a row per (sample, layer, head, part, token); otherwise one per (layer, head, part)
            with means over samples and tokens, summed in float64.
        ignore_first: real tokens at the start of a sequence at which measures that need a context are
            NaN per token, and which their means leave out.
        passes: per token, what each forward pass gave: layer and part to rows.
        reasons: layer, by its number or name, to why nothing was measured there.
    """

    measures: tuple[str, ...] = field(default_factory=lambda: tuple(all_measures()))
    scores: ScoresFrom = "post_rope"
    per_token: bool = False
    ignore_first: int = IGNORE_FIRST
    passes: list[dict[Place, Rows]] = field(default_factory=list)
    reasons: dict[int | str, str] = field(default_factory=dict)
    _sums: dict[Place, _Sums] = field(default_factory=dict)
    _open: bool = False
    _resumed: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def begin(self) -> None:
        """A forward pass begins: what is added up to its `end` belongs together."""
        self._open = True
        if self.per_token and (not self.passes or self.passes[-1]):
            self.passes.append({})

    def end(self) -> None:
        """The forward pass that began last is over."""
        self._open = False
        if self.passes and not self.passes[-1]:
            self.passes.pop()

    def resume(self, layer: int) -> None:
        """What is added to `layer` next goes on with its last sequences: their tokens are numbered on."""
        self._resumed.add(layer)

    @torch.no_grad()
    def add(self, layer: int, observation: Observation) -> None:
        """Measure one layer of one forward pass.

        A layer seen again within a pass has more samples, or after `resume` longer ones. Outside of
        `begin` and `end` a layer seen again begins the next pass.
        """
        if isinstance(observation, Unmeasured):
            self.reasons[layer] = observation.reason
            return
        offered = []
        for part, seen in by_part(observation):
            values = measure(seen, scores=self.scores, measures=self.measures)
            if self.per_token:
                values = {name: value for name, value in values.items() if not measure_of(name).least_of}
            if values:
                offered.append((part, seen, {name: value.float() for name, value in values.items()}))
        if not offered:
            self.reasons.setdefault(layer, f"it offers none of {', '.join(self.measures)}")
            return
        with self._lock:
            segment = layer in self._resumed
            self._resumed.discard(layer)
            again = self.per_token and any((layer, part) in self._last() for part, _, _ in offered)
            if self.per_token and (not self.passes or (not self._open and again)):
                self.passes.append({})
            for part, seen, values in offered:
                self._take((layer, part), seen, values, segment)

    def _last(self) -> dict[Place, Rows]:
        return self.passes[-1] if self.passes else {}

    def _take(self, at: Place, seen: Observation, values: dict[str, Tensor], segment: bool) -> None:
        real = documents = None
        if isinstance(seen, (Scores, Weights, Margins, Values)):
            real, documents = seen.key_mask, seen.documents
        if not self.per_token:
            self._accumulate(at, values, real, documents)
            return
        like = next(iter(values.values()))
        values = without_early(values, self._with_context(like, real, documents))
        rows, here = Rows(values, real, _uniform(seen, like.shape[-1])), self.passes[-1]
        here[at] = _joined(here[at], rows, segment) if at in here else rows

    def columns(self) -> dict[str, np.ndarray]:
        """Head-table columns, ordered by sample, layer, part, head, token; `part` only where heads have some.

        A measure that some layers offer and others do not is NaN in the rows of the others.

        Raises:
            HeadwiseError: nothing was measured; says why.
        """
        if not self.passes and not self._sums:
            why = next(iter(self.reasons.values()), "the model has not run")
            raise HeadwiseError(f"no head was measured: {why}")
        return self._token_columns() if self.per_token else self._mean_columns()

    def _with_context(self, like: Tensor, real: Tensor | None, documents: Tensor | None) -> Tensor:
        """`(B or 1, 1, T)`, True from the real token number `ignore_first` of each document on."""
        if real is None:
            positions = torch.arange(like.shape[-1], device=like.device)[None]
        else:
            positions = real.cumsum(-1) - 1
        starts = document_starts(documents)
        if starts is not None:  # less the real tokens before the document
            before = positions if real is None else real.cumsum(-1) - real.long()
            positions = positions - before.expand(starts.shape).gather(1, starts.long())
        return (positions >= self.ignore_first)[:, None]

    def _accumulate(
        self, at: Place, values: dict[str, Tensor], real: Tensor | None, documents: Tensor | None
    ) -> None:
        stacked = torch.stack(list(values.values())).double()  # (measures, B, H, T)
        has = counted(values, self._with_context(stacked, real, documents), real)
        total = torch.where(has, stacked, 0.0).sum((1, 3))
        count = has.sum((1, 3))
        rows = _of_least(values)
        least = torch.where(has[rows], stacked[rows], torch.inf).amin((1, 3))
        known = self._sums.get(at)
        if known is None:
            self._sums[at] = _Sums(list(values), total, count, least)
        else:
            known.total += total
            known.count += count
            known.least = torch.minimum(known.least, least)

    def _mean_columns(self) -> dict[str, np.ndarray]:
        layers, heads, parts = [], [], []
        means: dict[str, list[np.ndarray]] = {name: [] for name in self.measures}
        for (layer, part), sums in sorted(self._sums.items()):
            n_heads = sums.total.shape[1]
            layers.append(np.full(n_heads, layer, np.int32))
            parts.append(np.full(n_heads, part or None, object))
            heads.append(np.arange(n_heads, dtype=np.int32))
            mean = sums.total / sums.count
            mean[_of_least(sums.names)] = sums.least.where(sums.least.isfinite(), torch.nan)
            means_of = mean.float().cpu().numpy()
            for name, column in means.items():
                has = name in sums.names
                column.append(
                    means_of[sums.names.index(name)] if has else np.full(n_heads, np.nan, np.float32)
                )
        present = {name for sums in self._sums.values() for name in sums.names}
        keys = {"layer": np.concatenate(layers), "head": np.concatenate(heads)}
        keys |= _parts(self._sums, parts)
        return keys | {name: np.concatenate(means[name]) for name in self.measures if name in present}

    def _token_columns(self) -> dict[str, np.ndarray]:
        present = {name for one in self.passes for rows in one.values() for name in rows.values}
        names = [name for name in self.measures if name in present]
        columns: dict[str, list[np.ndarray]] = {
            name: [] for name in ("sample", "layer", "head", "token", *names)
        }
        parts: list[np.ndarray] = []
        first_sample = 0
        for one in self.passes:
            here = {at: _to_host(rows) for at, rows in sorted(one.items())}
            batch = max(len(real) for _, real in here.values())
            for sample in range(batch):
                for (layer, part), (values, real) in here.items():
                    if sample < len(real):
                        _append_rows(columns, names, values, real, sample, first_sample, layer)
                        parts.append(np.full(len(columns["head"][-1]), part or None, object))
            first_sample += batch
        found = {name: np.concatenate(column) for name, column in columns.items()}
        return found | _parts([at for one in self.passes for at in one], parts)


def _of_least(names: Iterable[str]) -> list[int]:
    """Which of some measures are the smallest of others."""
    return [row for row, name in enumerate(names) if measure_of(name).least_of]


def _joined(first: Rows, second: Rows, segment: bool) -> Rows:
    """The rows of two calls of one layer: tokens of one sequence after the other's, or more samples."""
    real = [_real(rows) for rows in (first, second)]
    segment = segment and len(real[0]) == len(real[1])
    if segment:
        values = {name: torch.cat((first.values[name], second.values[name]), -1) for name in first.values}
        return Rows(values, torch.cat(real, 1), first.uniform)
    tokens = max(x.shape[1] for x in real)
    values = {
        name: torch.cat([_widened(rows.values[name], tokens) for rows in (first, second)])
        for name in first.values
    }
    return Rows(values, torch.cat([_widened(x, tokens) for x in real]), first.uniform)


def _real(rows: Rows) -> Tensor:
    like = next(iter(rows.values.values()))
    shape = (like.shape[0], like.shape[-1])
    return torch.ones(shape, dtype=torch.bool, device=like.device) if rows.real is None else rows.real


def _widened(x: Tensor, tokens: int) -> Tensor:
    """`x (…, T)` with more tokens, that are not real."""
    return torch.nn.functional.pad(x, (0, tokens - x.shape[-1]))


def _parts(places: Iterable[Place], parts: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The column `part`, where there is any."""
    return {"part": np.concatenate(parts)} if any(part for _, part in places) else {}


def _uniform(seen: Observation, tokens: int) -> tuple[float, float]:
    """Mean number of keys that a query sees of so many tokens, and their mean distance."""
    causal, window, lengths = True, None, None
    if isinstance(seen, Scores):
        causal, window = seen.causal, seen.window
        starts = document_starts(seen.documents)
        if starts is not None:  # every token's document is as long as its start is frequent
            lengths = [np.unique(row, return_counts=True)[1] for row in starts.cpu().numpy()]
    documents = [tokens] if lengths is None else np.concatenate(lengths)
    back = [np.minimum(np.arange(n), (window or tokens) - 1) for n in documents]
    behind = np.concatenate(back)
    ahead = np.zeros_like(behind) if causal else np.concatenate([x[::-1] for x in back])
    keys = behind + ahead + 1
    distance = (behind * (behind + 1) + ahead * (ahead + 1)) / 2 / keys
    return float(keys.mean()), float(distance.mean())


def _to_host(rows: Rows) -> tuple[dict[str, np.ndarray], np.ndarray]:
    values = {name: value.cpu().numpy() for name, value in rows.values.items()}
    batch, _, tokens = next(iter(values.values())).shape
    real = np.ones((batch, tokens), bool) if rows.real is None else rows.real.cpu().numpy()
    return values, real


def _append_rows(
    columns: dict[str, list[np.ndarray]],
    names: list[str],
    values: dict[str, np.ndarray],
    real: np.ndarray,
    sample: int,
    first_sample: int,
    layer: int,
) -> None:
    """Add the rows of one (sample, layer), head by head."""
    n_heads = next(iter(values.values())).shape[1]
    tokens = np.flatnonzero(real[sample]).astype(np.int32)
    n_rows = n_heads * len(tokens)
    columns["sample"].append(np.full(n_rows, first_sample + sample, np.int64))
    columns["layer"].append(np.full(n_rows, layer, np.int32))
    columns["head"].append(np.repeat(np.arange(n_heads, dtype=np.int32), len(tokens)))
    columns["token"].append(np.tile(tokens, n_heads))
    for name in names:
        value = values.get(name)
        if value is None:
            columns[name].append(np.full(n_rows, np.nan, np.float32))
        else:
            columns[name].append(value[sample][:, tokens].ravel())
