"""How a head attends, per query: entropy, sharpness, reach and the logits behind them.

`head_stats` takes queries and keys and never forms a (T, T) tensor: plain PyTorch works through
tiles of a fixed number of scores (this file's `_tile`), a GPU with Triton through the fused kernel
of `headwise.kernels.head_stats`. `weights_stats` gives the same measures of explicit weights.

With `s = softcap(scale · q_scale · q·k)` over the visible keys of query i and
`p = softmax(s + bias)`:

    entropy          -Σ p ln p                                          nats
    max_weight       max p
    k_eff            fewest keys whose weights sum to at least `mass`   keys
    query_norm       |q_scale| · ‖q_i‖
    logit_mean/std   of s, without the bias; std of the population (divided by n)
    sink_weight      p on key 0
    self_weight      p on key i
    previous_weight  p on key i - 1; 0 for i = 0
    mean_distance    Σ p_j |i - j|                                      tokens

A key that is not visible has weight 0. A query that sees no key has no distribution: every
measure but `query_norm` is NaN.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Scores per tile: a tile and its temporaries stay in a CPU core's cache; a GPU wants wide launches.
TILE_CPU = 1 << 19
TILE_GPU = 1 << 26
ROWS_CPU = 64
# Finite, so that 0 · HIDDEN = 0 and not NaN; far below any logit.
HIDDEN = -1e30
BLOCK = 32
# The share of weight by which a row may miss `mass` and still meet it: rounding of float32 weights,
# without which uniform rows would waver between k and k + 1.
SLACK = {torch.float32: 3e-7, torch.float64: 1e-13}


@dataclass(frozen=True)
class HeadStats:
    """Measures per query, each `(B, H, T)`, or `(S, B, H, T)` with S query scales; None = not asked
    for, or not defined for explicit weights. float32 (float64 for float64 inputs)."""

    entropy: Tensor
    max_weight: Tensor
    k_eff: Tensor | None
    query_norm: Tensor | None
    logit_mean: Tensor | None
    logit_std: Tensor | None
    sink_weight: Tensor
    self_weight: Tensor
    previous_weight: Tensor
    mean_distance: Tensor

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
    mass: float = 0.9,
    k_eff: bool = True,
) -> HeadStats:
    """Measure the softmax attention of every query; extra memory O(T), no gradients.

    Args:
        q: queries `(B, H, T, D)`.
        k: keys `(B, K, T, D)` with `H % K == 0`; query head h reads key head `h // (H // K)`.
        causal: query i sees keys j <= i only.
        scale: factor on q·k, default `D ** -0.5`.
        q_scales: S factors on the queries; measures become `(S, B, H, T)`.
        bias: added to the (soft-capped) logits, `(B or 1, H or 1, T, T)`. -inf, or half the lowest
            finite number of its dtype and below, hides a key.
        window: query i sees keys `j > i - window` only (and `j < i + window` when not causal).
        softcap: logits become `softcap · tanh(logits / softcap)`.
        key_mask: bool `(B, T)`, True where a key is real.
        mass: share of the weight that `k_eff` counts keys for, in (0, 1).
        k_eff: whether to measure `k_eff`, the costliest of the measures.

    Raises:
        ValueError: shapes that do not fit each other, or a parameter outside its range.
    """
    _check(q, k, bias=bias, key_mask=key_mask, window=window, softcap=softcap, mass=mass)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    factors = [1.0] if q_scales is None else [float(x) for x in q_scales]
    options = {
        "causal": causal, "window": window, "softcap": softcap, "mass": mass, "k_eff": k_eff,
    }  # fmt: skip
    if _fits_kernel(q, k) and scale > 0 and min(factors) >= 0:
        from headwise.kernels.head_stats import head_stats as measure
    else:
        measure = _plain
    with torch.autocast(q.device.type, enabled=False):
        stats = measure(q, k, scale, factors, bias, key_mask, **options)
    if q_scales is None:
        stats = {name: value[0] for name, value in stats.items()}
    return HeadStats(**{"k_eff": None, **stats})


@torch.no_grad()
def weights_stats(weights: Tensor, *, mass: float = 0.9, k_eff: bool = True) -> HeadStats:
    """Measure explicit weights, as they are given (rows are not normalised); extra memory O(T).

    Args:
        weights: `(B, H, T, T)`, not negative. A row of zeros is a query that sees no key.

    Returns:
        HeadStats without `query_norm`, `logit_mean` and `logit_std`.
    """
    if weights.dim() != 4 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must be (B, H, T, T), got {tuple(weights.shape)}")
    _check_mass(mass)
    batch, heads, tokens, _ = weights.shape
    dtype = _compute_dtype(weights)
    out: dict[str, Tensor] = {}
    rows, _ = _tile_shape(weights, 1, tokens)
    positions = torch.arange(tokens, device=weights.device)
    for b in range(batch):
        for h in range(heads):
            for q0 in range(0, tokens, rows):
                p = weights[b, h : h + 1, q0 : q0 + rows].to(dtype, copy=True)
                queries = positions[q0 : q0 + rows]
                total = p.sum(-1)
                tile = {"entropy": torch.special.entr(p).sum(-1), "max_weight": p.amax(-1)}
                tile |= _where_it_looks(p, 1.0, queries, positions, causal=False)
                if k_eff:
                    tile["k_eff"] = _count_keys(p, torch.ones_like(total), mass)
                _store(out, tile, total > 0, (1, batch, heads, tokens), 0, b, h, q0)
    stats = {name: value[0] for name, value in out.items()}
    absent = dict.fromkeys(("query_norm", "logit_mean", "logit_std", "k_eff"))
    return HeadStats(**{**absent, **stats})


def _fits_kernel(q: Tensor, k: Tensor) -> bool:
    """Whether the Triton kernel takes these; what it does not take, plain PyTorch measures."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return (
        q.is_cuda
        and q.dtype == k.dtype
        and q.dtype in dtypes
        and q.shape[-1] <= 256
        and importlib.util.find_spec("triton") is not None
    )


def _plain(
    q: Tensor,
    k: Tensor,
    scale: float,
    factors: list[float],
    bias: Tensor | None,
    key_mask: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    mass: float,
    k_eff: bool,
) -> dict[str, Tensor]:
    """The definition, tile by tile: some heads of one sequence by a block of queries."""
    batch, heads, tokens, width = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    dtype = _compute_dtype(q)
    shape = (len(factors), batch, heads, tokens)
    out = {"query_norm": torch.empty(shape, dtype=dtype, device=q.device)}
    for n, factor in enumerate(factors):
        out["query_norm"][n] = abs(factor) * torch.linalg.vector_norm(q, dim=-1, dtype=dtype)
    rows, kv_step = _tile_shape(q, group, tokens)
    positions = torch.arange(tokens, device=q.device)
    can_be_blind = bias is not None or key_mask is not None
    for b in range(batch):
        for g0 in range(0, kv_heads, kv_step):
            g1 = min(g0 + kv_step, kv_heads)
            some = slice(g0 * group, g1 * group)
            key_block = k[b, g0:g1].to(dtype)
            query_block = q[b, some].to(dtype).mul(scale).view(g1 - g0, group, tokens, width)
            bias_block = None if bias is None else _heads_of(bias[b % bias.shape[0]], some)
            for q0 in range(0, tokens, rows):
                q1 = min(q0 + rows, tokens)
                first = 0 if window is None else max(0, q0 - window + 1)
                last = q1 if causal else tokens
                if window is not None:
                    last = min(last, q1 + window - 1)
                queries, keys = positions[q0:q1], positions[first:last]
                raw = query_block[:, :, q0:q1].reshape(g1 - g0, -1, width)
                raw = (raw @ key_block[:, first:last].mT).view(-1, q1 - q0, last - first)
                added = None if bias_block is None else bias_block[:, q0:q1, first:last].to(dtype)
                hidden = _hidden(queries, keys, causal, window, bias_block, key_mask, b)
                n_visible = last - first - (0 if hidden is None else hidden.sum(-1).to(dtype))
                seen = n_visible > 0 if can_be_blind else None
                for n, factor in enumerate(factors):
                    s = raw if n == len(factors) - 1 else raw.clone()
                    if factor != 1.0:
                        s *= factor
                    if softcap is not None:
                        s.div_(softcap).tanh_().mul_(softcap)
                    tile = _tile(s, added, hidden, n_visible, queries, keys, causal, mass, k_eff)
                    _store(out, tile, seen, shape, n, b, some.start, q0)
    return out


def _tile(
    s: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    n_visible: Tensor | int,
    queries: Tensor,
    keys: Tensor,
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
        s += bias
    if hidden is not None:
        edge.masked_fill_(hidden, HIDDEN)
    s -= s.amax(-1, keepdim=True)
    e = torch.exp(s)
    total = e.sum(-1)
    stats["entropy"] = total.log() - s.mul_(e).sum(-1) / total
    stats["max_weight"] = 1.0 / total
    stats |= _where_it_looks(e, total, queries, keys, causal)
    if k_eff:
        stats["k_eff"] = _count_keys(e, total, mass)
    return stats


def _where_it_looks(
    e: Tensor, total: Tensor | float, queries: Tensor, keys: Tensor, causal: bool
) -> dict[str, Tensor]:
    """Weights on key 0, i and i - 1 and the mean distance; weights are `e (h, c, n) / total`."""
    shift = int(queries[0] - keys[0])
    sink = e[..., 0] if keys[0] == 0 else torch.zeros_like(e[..., 0])
    previous = torch.zeros_like(sink)
    before = e.diagonal(shift - 1, dim1=-2, dim2=-1)
    previous[..., previous.shape[-1] - before.shape[-1] :] = before
    if causal:
        ahead = (keys - queries[0]).to(e.dtype)
        distance = (queries - queries[0]) - (e @ ahead) / total
    else:
        apart = (queries.unsqueeze(-1) - keys).abs().to(e.dtype)
        distance = (e * apart).sum(-1) / total
    return {
        "sink_weight": sink / total,
        "self_weight": e.diagonal(shift, dim1=-2, dim2=-1) / total,
        "previous_weight": previous / total,
        "mean_distance": distance,
    }


def _count_keys(e: Tensor, total: Tensor, mass: float) -> Tensor:
    """Fewest keys that hold `mass` of `total`; sorts `e (h, c, n)` in place.

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
    count = (upto.shape[-1] * BLOCK - dropped).squeeze(-1).clamp_(min=1).to(e.dtype)
    return count.where(total.isfinite(), torch.nan)


def _hidden(
    queries: Tensor,
    keys: Tensor,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    b: int,
) -> Tensor | None:
    """Keys a query does not see, `(h or 1, c, n')` over the tile's last n' keys; None: sees all.

    Causality alone hides keys only at the tile's diagonal, which is all that is covered then.
    """
    if causal and window is None and bias is None and key_mask is None:
        return torch.ones(len(queries), len(queries), dtype=torch.bool, device=queries.device).triu_(1)[None]
    hidden = torch.zeros(1, len(queries), len(keys), dtype=torch.bool, device=queries.device)
    ahead = keys - queries.unsqueeze(-1)
    if causal:
        hidden |= ahead > 0
    if window is not None:
        hidden |= ahead.abs() >= window
    if key_mask is not None:
        hidden |= ~key_mask[b, keys[0] : keys[-1] + 1]
    if bias is not None:
        lowest = torch.finfo(bias.dtype).min / 2
        part = bias[:, queries[0] : queries[-1] + 1, keys[0] : keys[-1] + 1]
        hidden = hidden | (part <= lowest)
    elif not causal and window is None and key_mask is None:
        return None
    return hidden


def _heads_of(bias: Tensor, some: slice) -> Tensor:
    return bias if bias.shape[0] == 1 else bias[some]


def _store(
    out: dict[str, Tensor],
    tile: dict[str, Tensor],
    seen: Tensor | None,
    shape: tuple[int, ...],
    n: int,
    b: int,
    h0: int,
    q0: int,
) -> None:
    for name, value in tile.items():
        if name not in out:
            out[name] = torch.empty(shape, dtype=value.dtype, device=value.device)
        h, c = value.shape
        if seen is not None:
            value = value.where(seen, torch.nan)
        out[name][n, b, h0 : h0 + h, q0 : q0 + c] = value


def _tile_shape(x: Tensor, group: int, tokens: int) -> tuple[int, int]:
    """Queries and key/value heads per tile, so that a tile holds about TILE scores."""
    budget = TILE_CPU if x.device.type == "cpu" else TILE_GPU
    rows = max(1, min(tokens, ROWS_CPU if x.device.type == "cpu" else tokens, budget // tokens))
    return rows, max(1, budget // (rows * tokens * group))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_mass(mass: float) -> None:
    if not 0.0 < mass < 1.0:
        raise ValueError(f"mass must lie in (0, 1), got {mass}")


def _check(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None,
    key_mask: Tensor | None,
    window: int | None,
    softcap: float | None,
    mass: float,
) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q must be (B, H, T, D) and k (B, K, T, D), {shapes}")
    batch, heads, tokens, width = q.shape
    if k.shape[0] != batch or k.shape[2:] != (tokens, width):
        raise ValueError(f"q and k must agree in B, T and D, {shapes}")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"query heads must be divisible by key heads, {shapes}")
    if bias is not None and (
        bias.dim() != 4
        or bias.shape[0] not in (1, batch)
        or bias.shape[1] not in (1, heads)
        or bias.shape[2:] != (tokens, tokens)
        or not bias.dtype.is_floating_point
    ):
        raise ValueError(
            f"bias must be a float tensor (B or 1, H or 1, T, T), got {bias.dtype} "
            f"{tuple(bias.shape)} for q {tuple(q.shape)}"
        )
    if key_mask is not None and (key_mask.shape != (batch, tokens) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask must be bool (B, T), got {key_mask.dtype} {tuple(key_mask.shape)} "
            f"for q {tuple(q.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    _check_mass(mass)
