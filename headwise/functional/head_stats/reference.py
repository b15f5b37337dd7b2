"""The measures of `head_stats` in plain PyTorch, tile by tile: the definition, and what a CPU runs.

A tile is a block of queries of some heads of one sequence against the keys they can see; its size
is bounded, so memory is O(T), and chosen so that a tile and its temporaries stay in a CPU's cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Scores per tile, and queries; a GPU wants wide launches instead.
TILE_CPU = 1 << 19
TILE_GPU = 1 << 26
ROWS_CPU = 64
# Finite, so that 0 · HIDDEN = 0 and not NaN; far below any logit.
HIDDEN = -1e30
# The share of weight by which a row may miss `mass` and still meet it: rounding of float32 weights,
# without which uniform rows would waver between k and k + 1.
SLACK = {torch.float32: 3e-7, torch.float64: 1e-13}
# Not a measure: ln Σ exp(s + bias), -inf of a query that sees no key. What a sink takes follows from it.
LOG_TOTAL = "log_total"
# What queries of another sequence do not have: a position among the keys.
OF_POSITIONS = ("self_weight", "previous_weight", "mean_distance")
# Keys per sum in the search for k_eff.
BLOCK = 32
# How near a sum of weights may come to `mass` for k_eff to be off by one.
NEAR = 1e-6


class Span(NamedTuple):
    """Queries at the positions `q0 … q1 - 1` of the keys' sequence against keys `k0 … k1 - 1`."""

    q0: int
    q1: int
    k0: int
    k1: int

    def queries(self, device: torch.device) -> Tensor:
        return torch.arange(self.q0, self.q1, device=device)

    def keys(self, device: torch.device) -> Tensor:
        return torch.arange(self.k0, self.k1, device=device)


def of_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    factors: list[float],
    bias: Tensor | None,
    key_mask: Tensor | None,
    starts: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    mass: float,
    k_eff: bool,
    offset: int | None = 0,
) -> dict[str, Tensor]:
    """Measures by name, each `(S, B, H, T)` for S factors; `starts (B, Tk)` is where the document of each
    key begins; other arguments as `head_stats` takes."""
    batch, heads, tokens, width = q.shape
    kv_heads, n_keys = k.shape[1:3]
    first = offset or 0
    group = heads // kv_heads
    dtype = _compute_dtype(q)
    shape = (len(factors), batch, heads, tokens)
    out = {"query_norm": torch.empty(shape, dtype=dtype, device=q.device)}
    for n, factor in enumerate(factors):
        out["query_norm"][n] = abs(factor) * torch.linalg.vector_norm(q, dim=-1, dtype=dtype)
    rows, kv_step = _tile_shape(q, group, tokens, n_keys)
    can_be_blind = bias is not None or key_mask is not None or first < 0 or first + tokens > n_keys
    sinks = first_real_keys(key_mask, starts)
    for b in range(batch):
        real = None if key_mask is None else key_mask[b]
        start = None if starts is None else starts[b]
        for g0 in range(0, kv_heads, kv_step):
            g1 = min(g0 + kv_step, kv_heads)
            some = slice(g0 * group, g1 * group)
            key_block = k[b, g0:g1].to(dtype)
            query_block = q[b, some].to(dtype).mul(scale).view(g1 - g0, group, tokens, width)
            bias_block = None if bias is None else bias[b % bias.shape[0]]
            if bias_block is not None and bias_block.shape[0] > 1:
                bias_block = bias_block[some]
            for q0 in range(0, tokens, rows):
                here = slice(q0, min(q0 + rows, tokens))
                span = _visible_span(here.start + first, here.stop + first, n_keys, causal, window)
                raw = query_block[:, :, here].reshape(g1 - g0, -1, width)
                raw = raw @ key_block[:, span.k0 : span.k1].mT
                raw = raw.view(-1, span.q1 - span.q0, span.k1 - span.k0)
                part = None if bias_block is None else bias_block[:, here, span.k0 : span.k1]
                hidden = _hidden(span, causal, window, part, real, start, q.device)
                sink = None if sinks is None else sinks[b, span.queries(q.device).clamp(0, n_keys - 1)]
                n_visible: Tensor | int = span.k1 - span.k0
                if hidden is not None:
                    n_visible = n_visible - hidden.sum(-1).to(dtype)
                seen = n_visible > 0 if can_be_blind and isinstance(n_visible, Tensor) else None
                for n, factor in enumerate(factors):
                    s = raw if n == len(factors) - 1 else raw.clone()
                    if factor != 1.0:
                        s *= factor
                    if softcap is not None:
                        s.div_(softcap).tanh_().mul_(softcap)
                    tile = _tile(s, part, hidden, n_visible, span, sink, causal, mass, k_eff)
                    if offset is None:
                        tile = {name: value for name, value in tile.items() if name not in OF_POSITIONS}
                    _store(out, tile, seen, shape, (n, b, some.start, q0))
    return out


def of_weights(
    weights: Tensor, key_mask: Tensor | None, starts: Tensor | None, *, mass: float, k_eff: bool
) -> dict[str, Tensor]:
    """Measures of explicit weights `(B, H, T, T)` by name, each `(B, H, T)`."""
    batch, heads, tokens, _ = weights.shape
    dtype = _compute_dtype(weights)
    out: dict[str, Tensor] = {}
    rows, _ = _tile_shape(weights, 1, tokens, tokens)
    sinks = first_real_keys(key_mask, starts)
    for b in range(batch):
        for h in range(heads):
            for q0 in range(0, tokens, rows):
                span = Span(q0, min(q0 + rows, tokens), 0, tokens)
                p = weights[b, h : h + 1, span.q0 : span.q1].to(dtype, copy=True)
                total = p.sum(-1)
                tile = {"entropy": torch.special.entr(p).sum(-1), "max_weight": p.amax(-1)}
                sink = None if sinks is None else sinks[b, span.q0 : span.q1]
                tile |= _where_it_looks(p, torch.ones_like(total), span, sink, causal=False)
                if k_eff:
                    tile["k_eff"] = _count_keys(p, total, mass)
                _store(out, tile, total > 0, (1, batch, heads, tokens), (0, b, h, q0))
    return {name: value[0] for name, value in out.items()}


def _tile(
    s: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    n_visible: Tensor | int,
    span: Span,
    sink: Tensor | None,
    causal: bool,
    mass: float,
    k_eff: bool,
) -> dict[str, Tensor]:
    """Measures of scores `s (h, c, n)`, which are overwritten.

    `hidden` covers the last keys of the tile, as many as it has columns; keys before them are
    visible to every query of the tile.
    """
    edge = s
    if hidden is not None:
        edge = s[..., s.shape[-1] - hidden.shape[-1] :]
        edge.masked_fill_(hidden, 0.0)
    # Logits are centred before they are squared: no cancellation, and the softmax does not mind.
    mean = s.sum(-1) / n_visible
    s -= mean.unsqueeze(-1)
    if hidden is not None:
        edge.masked_fill_(hidden, 0.0)
    root = n_visible**0.5
    stats = {"logit_mean": mean, "logit_std": torch.linalg.vector_norm(s, dim=-1) / root}
    if bias is not None:
        logits = s
        if hidden is not None:
            logits = torch.cat((s[..., : -hidden.shape[-1]], edge.masked_fill(hidden, HIDDEN)), -1)
        stats["logit_max"] = mean + logits.amax(-1)
        stats["log_sum_exp"] = mean + logits.logsumexp(-1)
        s += bias
    if hidden is not None:
        edge.masked_fill_(hidden, HIDDEN)
    top = s.amax(-1, keepdim=True)
    s -= top
    e = torch.exp(s)
    total = e.sum(-1)
    highest = mean + top.squeeze(-1)
    stats[LOG_TOTAL] = highest + total.log()
    if bias is None:
        stats |= {"logit_max": highest, "log_sum_exp": stats[LOG_TOTAL]}
    stats["entropy"] = total.log() - s.mul_(e).sum(-1) / total
    stats["max_weight"] = 1.0 / total
    stats |= _where_it_looks(e, total, span, sink, causal)
    if k_eff:
        stats["k_eff"] = _count_keys(e, total, mass)
    return stats


def first_real_keys(key_mask: Tensor | None, starts: Tensor | None) -> Tensor | None:
    """The first real key of each token's document, int64 `(B, T)`, where the document has one; None where
    it is key 0 for all."""
    if key_mask is None:
        return None if starts is None else starts.long()
    tokens = key_mask.shape[1]
    begin = torch.zeros_like(key_mask, dtype=torch.int64) if starts is None else starts.long()
    position = torch.arange(tokens, device=key_mask.device)
    # The next real key from each position on.
    following = torch.where(key_mask, position, tokens - 1).flip(-1).cummin(-1).values.flip(-1)
    return following.gather(1, begin)


def _where_it_looks(
    e: Tensor, total: Tensor, span: Span, first: Tensor | None, causal: bool
) -> dict[str, Tensor]:
    """Weights on the first key, i and i - 1 and the mean distance; weights are `e (h, c, n) / total`.

    `first (c,)` is each query's first key, None where it is key 0.
    """
    shift = span.q0 - span.k0
    if first is not None:
        at = (first - span.k0).expand(e.shape[:-1]).unsqueeze(-1)
        inside = (at >= 0) & (at < e.shape[-1])
        sink = torch.where(inside, e.gather(-1, at.clamp(0, e.shape[-1] - 1)), 0.0).squeeze(-1)
    else:
        sink = e[..., 0] if span.k0 == 0 else torch.zeros_like(e[..., 0])
    queries, keys = span.queries(e.device), span.keys(e.device)
    if causal:
        ahead = (keys - span.q0).to(e.dtype)
        distance = (queries - span.q0) - (e @ ahead) / total
    else:
        apart = (queries.unsqueeze(-1) - keys).abs().to(e.dtype)
        distance = (e * apart).sum(-1) / total
    return {
        "sink_weight": sink / total,
        "self_weight": _diagonal(e, shift) / total,
        "previous_weight": _diagonal(e, shift - 1) / total,
        "mean_distance": distance,
    }


def _diagonal(e: Tensor, shift: int) -> Tensor:
    """`e[…, r, r + shift]` for each row r of `e (h, c, n)`; 0 where there is no such column."""
    rows, columns = e.shape[-2:]
    first, last = max(0, -shift), min(rows, columns - shift)
    if first == 0 and last == rows:
        return e.diagonal(shift, dim1=-2, dim2=-1)
    found = torch.zeros_like(e[..., 0])
    if first < last:
        found[..., first:last] = e.diagonal(shift, dim1=-2, dim2=-1)
    return found


def k_eff_by_sorting(weights: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The definition of `k_eff`: the smallest number of keys whose largest weights sum to at least `mass`.

    Args:
        weights: `(..., T)`, taken as float32 and summed in float64; `mass` is a share of the row's sum.

    Returns:
        `k_eff` and whether some keys' sum meets `mass` within `NEAR`, where an engine may differ by one;
        each `(...)`. NaN for a row without weight.
    """
    gathered = weights.float().sort(-1, descending=True).values.double().cumsum(-1)
    share = gathered / gathered[..., -1:]
    count = (share < mass).sum(-1) + 1.0
    return count.where(share[..., -1] > 0, torch.nan), ((share - mass).abs() < NEAR).any(-1)


def _count_keys(e: Tensor, total: Tensor, mass: float) -> Tensor:
    """`k_eff` as `k_eff_by_sorting` defines it, of weights `e (h, c, n)` that sum to `total`; sorts in place.

    Keys are dropped from the lightest up for as long as what is dropped leaves `mass`. Sums of
    blocks find the block where that ends, a running sum over this block alone the key.
    """
    if e.device.type == "cpu":
        e.numpy().sort(axis=-1)  # vectorised in numpy >= 2, ten times faster than torch's
    else:
        e = e.sort(-1).values
    droppable = (total.double() * (1.0 - mass + SLACK[e.dtype])).unsqueeze(-1)
    blocks = torch.nn.functional.pad(e, (-e.shape[-1] % BLOCK, 0)).unflatten(-1, (-1, BLOCK))
    upto = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    whole = torch.searchsorted(upto, droppable, right=True).clamp_(max=upto.shape[-1] - 1)
    before = torch.where(whole > 0, upto.gather(-1, (whole - 1).clamp_(min=0)), 0.0)
    last = blocks.gather(-2, whole.unsqueeze(-1).expand(*whole.shape, BLOCK)).squeeze(-2)
    running = last.cumsum(-1, dtype=torch.float64) + before
    dropped = whole * BLOCK + torch.searchsorted(running, droppable, right=True)
    count: Tensor = (upto.shape[-1] * BLOCK - dropped).squeeze(-1).clamp_(min=1).to(e.dtype)
    return count.where(total.isfinite(), torch.nan)


def _visible_span(q0: int, q1: int, tokens: int, causal: bool, window: int | None) -> Span:
    """The keys that queries at `q0 … q1 - 1` can see as far as causality and the window go, but at least
    one, be it hidden, of `tokens` keys."""
    first = 0 if window is None else max(0, q0 - window + 1)
    last = min(q1, tokens) if causal else tokens
    last = last if window is None else min(last, q1 + window - 1)
    if first >= last:
        first = min(first, tokens - 1)
        last = first + 1
    return Span(q0, q1, first, last)


def _hidden(
    span: Span,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    real: Tensor | None,
    start: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Keys a query does not see, `(h or 1, c, n')` over the tile's last n' keys; None: sees all.

    Causality alone hides keys only at the tile's diagonal, which is all that is covered then.
    """
    rows = span.q1 - span.q0
    if window is None and bias is None and real is None and start is None:
        if causal and not (span.k0 <= span.q0 and span.k1 == span.q1):  # not all of its diagonal is there
            return (span.keys(device) > span.queries(device).unsqueeze(-1)).unsqueeze(0)
        return torch.ones(1, rows, rows, dtype=torch.bool, device=device).triu_(1) if causal else None
    ahead = span.keys(device) - span.queries(device).unsqueeze(-1)
    hidden = (ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)).unsqueeze(0)
    if window is not None:
        hidden = hidden | (ahead.abs() >= window)
    if real is not None:
        hidden = hidden | ~real[span.k0 : span.k1]
    if start is not None:
        hidden = hidden | (start[span.q0 : span.q1, None] != start[span.k0 : span.k1])
    if bias is not None:
        hidden = hidden | (bias <= torch.finfo(bias.dtype).min / 2)
    return hidden


def _store(
    out: dict[str, Tensor],
    tile: dict[str, Tensor],
    seen: Tensor | None,
    shape: tuple[int, ...],
    at: tuple[int, int, int, int],
) -> None:
    """Put a tile's measures `(h, c)` where they belong; NaN for queries that see nothing."""
    n, b, h0, q0 = at
    for name, value in tile.items():
        if name not in out:
            out[name] = torch.empty(shape, dtype=value.dtype, device=value.device)
        h, c = value.shape
        if seen is not None:
            value = value.where(seen, -torch.inf if name == LOG_TOTAL else torch.nan)
        out[name][n, b, h0 : h0 + h, q0 : q0 + c] = value


def _tile_shape(x: Tensor, group: int, tokens: int, n_keys: int) -> tuple[int, int]:
    """Queries and key/value heads per tile, so that a tile holds about TILE scores."""
    budget = TILE_CPU if x.device.type == "cpu" else TILE_GPU
    rows = max(1, min(tokens, ROWS_CPU if x.device.type == "cpu" else tokens, budget // n_keys))
    return rows, max(1, budget // (rows * n_keys * group))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
