"""Statistics of a head's attention for each query: entropy, sharpness, distance, and the logits.

`head_stats` takes queries and keys and never forms a (T, T) tensor: plain PyTorch works through
tiles of a bounded number of scores (`reference`), a GPU with Triton through the fused kernel
of `headwise.functional.head_stats.kernel`. `weights_stats` gives the same measures of explicit weights.

With `s = softcap(scale · q_scale · q·k)` over the visible keys of query i and
`p = softmax(s + bias)`:

    entropy          -Σ p ln p                                          nats
    max_weight       max p
    k_eff            fewest keys whose largest weights sum to at least
                     `mass` (of the row's sum, for explicit weights)    keys
    query_norm       |q_scale| · ‖q_i‖
    logit_mean/std   of s, without the bias; std of the population (divided by n)
    logit_max        max s, without the bias
    log_sum_exp      ln Σ exp s, without the bias                       nats
    null_weight      what a sink c takes, exp(c) / (exp(c) + Σ exp(s + bias)); the other measures
                     are of the weights over the keys, normalised to 1
    sink_weight      p on the first real key of the query's document
    self_weight      p on key i
    previous_weight  p on key i - 1; 0 for i = 0
    mean_distance    Σ p_j |i - j|                                      tokens

A key that is not visible has weight 0. A query that sees no key has no distribution: every
measure but `query_norm` is NaN, and all of its weight is the sink's.

Queries may be fewer than keys, as with a cache, or of another sequence, as in cross-attention: `offset`
says where the first of them stands among the keys, and i means a query's position there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from headwise.functional.dispatch import fits_kernel
from headwise.functional.head_stats import reference

MASS = 0.9
"""`k_eff` counts keys for this share of a query's weight."""


@dataclass(frozen=True)
class HeadStats:
    """Measures per query, each `(B, H, T)`, or `(S, B, H, T)` with S query scales; None = not asked
    for, or not defined for explicit weights. float32 (float64 for float64 inputs)."""

    entropy: Tensor
    max_weight: Tensor
    sink_weight: Tensor
    self_weight: Tensor | None = None
    previous_weight: Tensor | None = None
    mean_distance: Tensor | None = None
    k_eff: Tensor | None = None
    query_norm: Tensor | None = None
    logit_mean: Tensor | None = None
    logit_std: Tensor | None = None
    logit_max: Tensor | None = None
    log_sum_exp: Tensor | None = None
    null_weight: Tensor | None = None

    def columns(self) -> dict[str, Tensor]:
        """The measures present, by the names of the head table's columns."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in pairs if value is not None}


@torch.no_grad()
def head_stats(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    q_scales: Sequence[float] | Tensor | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    sink: Tensor | None = None,
    offset: int | Literal["end"] | None = "end",
    mass: float = MASS,
    k_eff: bool = True,
) -> HeadStats:
    """Measure the softmax attention of every query; extra memory O(T), no gradients.

    Tq queries meet Tk keys; where nothing else is said both are T. One query costs O(Tk).

    Args:
        q: queries `(B, H, Tq, D)`.
        k: keys `(B, K, Tk, D)` with `H % K == 0`; query head h reads key head `h // (H // K)`.
        causal: query i sees keys j <= i only.
        scale: factor on q·k, default `D ** -0.5`.
        q_scales: S factors on the queries; measures become `(S, B, H, Tq)`.
        bias: added to the (soft-capped) logits, `(B or 1, H or 1, Tq, Tk)`. -inf, or half the lowest
            finite number of its dtype and below, hides a key.
        window: query i sees keys `j > i - window` only (and `j < i + window` when not causal).
        softcap: logits become `softcap · tanh(logits / softcap)`.
        key_mask: bool `(B, Tk)`, True where a key is real.
        documents: integers `(B, Tk)`, the same for the consecutive tokens of one document; a query sees
            keys of its own document only. None: a row is one document.
        sink: a logit that takes part in the softmax and has no key, `(H,)`, or one for each query
            `(B, H, Tq)`.
        offset: the position of the first query among the keys; "end": the queries are the last tokens of
            the keys' sequence, as after a cache. None: they are of another sequence, which they see in full
            but for what `bias` and `key_mask` hide; then there is no `self_weight`, `previous_weight` and
            `mean_distance`.
        mass: share of the weight that `k_eff` counts keys for, in (0, 1). The count is exact; where
            some keys' sum meets `mass` within 1e-6 it may be that number of keys.
        k_eff: whether to measure `k_eff`, the costliest of the measures.

    Raises:
        ValueError: shapes that do not fit each other, or a parameter outside its range.
    """
    _check(q, k, bias=bias, window=window, softcap=softcap, mass=mass)
    _check_tokens(q.shape[0], k.shape[2], key_mask, documents)
    _check_sink(q, sink)
    queries, keys = q.shape[2], k.shape[2]
    offset = keys - queries if offset == "end" else offset
    if offset is None and (causal or window is not None or documents is not None):
        raise ValueError(
            "queries of another sequence (offset=None) have no position among the keys: they take "
            "causal=False, and neither window nor documents"
        )
    if documents is not None and offset is not None and not 0 <= offset <= keys - queries:
        raise ValueError(
            f"with documents every query must be one of the {keys} keys, got {queries} queries from "
            f"{offset} on"
        )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    factors = [1.0] if q_scales is None else [float(x) for x in q_scales]
    measure: Callable[..., dict[str, Tensor]] = partial(reference.of_scores, offset=offset)
    square = offset == 0 and queries == keys  # what the kernels take
    if square and fits_kernel(q, 256) and k.dtype == q.dtype and scale > 0 and min(factors) >= 0:
        from headwise.functional.head_stats.kernel import head_stats as fused

        measure = fused
    with torch.autocast(q.device.type, enabled=False):
        stats = measure(
            q, k, scale, factors, bias, key_mask, document_starts(documents),
            causal=causal, window=window, softcap=softcap, mass=mass, k_eff=k_eff,
        )  # fmt: skip
    total = stats.pop(reference.LOG_TOTAL)
    if sink is not None:
        sink = sink[:, None] if sink.dim() == 1 else sink
        stats["null_weight"] = torch.sigmoid(sink.to(total.dtype) - total)
    if q_scales is None:
        stats = {name: value[0] for name, value in stats.items()}
    return HeadStats(**stats)


@torch.no_grad()
def weights_stats(
    weights: Tensor,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    mass: float = MASS,
    k_eff: bool = True,
) -> HeadStats:
    """Measure explicit weights, as they are given (rows are not normalised); extra memory O(T).

    `k_eff` counts keys for `mass` of the row's sum, which is 1 for rows that are normalised.

    Args:
        weights: `(B, H, T, T)`, not negative. A row of zeros is a query that sees no key.
        key_mask, documents: `(B, T)` as for `head_stats`; they only tell where a document begins. Without
            a key_mask, a key to which no query of any head gives weight is not real.

    Returns:
        HeadStats without `query_norm` and the measures of logits.
    """
    if weights.dim() != 4 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must be (B, H, T, T), got {tuple(weights.shape)}")
    if weights.numel() == 0:
        raise ValueError(f"there is nothing to measure in weights {tuple(weights.shape)}")
    _check_mass(mass)
    _check_tokens(weights.shape[0], weights.shape[2], key_mask, documents)
    starts = document_starts(documents)
    if key_mask is None:
        key_mask = torch.stack([sample.amax((0, 1)) > 0 for sample in weights])
    return HeadStats(**reference.of_weights(weights, key_mask, starts, mass=mass, k_eff=k_eff))


def document_starts(documents: Tensor | None) -> Tensor | None:
    """Where the document of each token begins, int32 `(B, T)`."""
    if documents is None:
        return None
    position = torch.arange(documents.shape[1], dtype=torch.int32, device=documents.device)
    inside = torch.nn.functional.pad(documents[:, 1:] == documents[:, :-1], (1, 0))
    return torch.where(inside, 0, position).cummax(-1).values


def _check_mass(mass: float) -> None:
    if not 0.0 < mass < 1.0:
        raise ValueError(f"mass must lie in (0, 1), got {mass}")


def _check(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None,
    window: int | None,
    softcap: float | None,
    mass: float,
) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q must be (B, H, T, D) and k (B, K, T, D), {shapes}")
    if q.numel() == 0:
        raise ValueError(f"there is nothing to measure without queries, {shapes}")
    batch, heads, tokens, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"q and k must agree in B and D, {shapes}")
    if k.numel() == 0:
        raise ValueError(f"there is nothing to measure without keys, {shapes}")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"query heads must be divisible by key heads, {shapes}")
    if bias is not None and (
        bias.dim() != 4
        or bias.shape[0] not in (1, batch)
        or bias.shape[1] not in (1, heads)
        or bias.shape[2:] != (tokens, k.shape[2])
        or not bias.dtype.is_floating_point
    ):
        raise ValueError(
            f"bias must be a float tensor (B or 1, H or 1, Tq, Tk), got {bias.dtype} "
            f"{tuple(bias.shape)} for q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    _check_mass(mass)


def _check_sink(q: Tensor, sink: Tensor | None) -> None:
    if sink is not None and sink.shape not in (q.shape[1:2], q.shape[:3]):
        raise ValueError(f"sink must be (H,) or (B, H, Tq), got {tuple(sink.shape)} for q {tuple(q.shape)}")


def _check_tokens(batch: int, tokens: int, key_mask: Tensor | None, documents: Tensor | None) -> None:
    expected = f"for B = {batch}, T = {tokens}"
    if key_mask is not None and (key_mask.shape != (batch, tokens) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask must be bool (B, T), got {key_mask.dtype} {tuple(key_mask.shape)} {expected} keys"
        )
    if documents is not None and (
        documents.shape != (batch, tokens) or documents.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"documents must be integers (B, T), got {documents.dtype} {tuple(documents.shape)} {expected}"
        )
