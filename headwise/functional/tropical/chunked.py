"""Tropical attention in plain PyTorch, some queries at a time: memory is bounded, and O(T·D) is kept.

Computes what the kernels do not: masks, wide heads, float64, and everything on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

AT_ONCE = 1 << 22
"""Scores in memory at a time; those of one query of every head at least."""


class Best(NamedTuple):
    """What a forward pass gives.

    Attributes:
        y: `(B, H, T, D)`, float32 or better, not centred.
        top: the largest score of each query, `(B, H, T)`.
        winner: the key whose offer is the largest, `(B, H, T, D)` int32; -1 where there is none.
        top_winner: the key with the largest score, `(B, H, T)` int32.
        margin: γ, `(B, H, T)`.
    """

    y: Tensor
    top: Tensor
    winner: Tensor
    top_winner: Tensor
    margin: Tensor


def room(q: Tensor, keep: bool, margin: bool) -> Best:
    """Uninitialised memory for a forward pass; empty where it is not to be kept."""
    precise = torch.promote_types(q.dtype, torch.float32)
    rows, none = q.shape[:3], q.new_empty(0, dtype=precise)
    return Best(
        q.new_empty(q.shape, dtype=precise),
        q.new_empty(rows, dtype=precise),
        q.new_empty(q.shape if keep else 0, dtype=torch.int32),
        q.new_empty(rows if keep else 0, dtype=torch.int32),
        q.new_empty(rows, dtype=precise) if margin else none,
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, causal: bool, keep: bool, margin: bool
) -> Best:
    """The largest offers.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, K, S, D)`; S = T where `causal`.
        bias: added to the scores, `(B or 1, H or 1, T, S)`; -inf hides a key.
        keep: keep the winners.
        margin: measure the margins.
    """
    found = room(q, keep, margin)
    precise, group, hidden = found.y.dtype, q.shape[1] // k.shape[1], -torch.inf
    q, k, v = q.to(precise), *(x.to(precise).repeat_interleave(group, dim=1) for x in (k, v))
    batch, heads, keys, _ = k.shape
    step = max(1, AT_ONCE // (batch * heads * keys))
    key = torch.arange(keys, device=q.device)
    for start in range(0, q.shape[2], step):
        at = slice(start, min(start + step, q.shape[2]))
        seen = at.stop if causal else keys
        score = scores(q[:, :, at], k[:, :, :seen])
        if bias is not None:
            score += bias[:, :, at, :seen]
        if causal:
            score.masked_fill_(key[:seen] > key[at, None], hidden)
        top = score.amax(-1)
        empty = top == hidden
        best, winner, second = offers(score, v[:, :, :seen], start if causal else None, keep, margin)
        found.y[:, :, at] = best.masked_fill(empty[..., None], 0.0)
        found.top[:, :, at] = top.masked_fill(empty, 0.0)
        if keep:
            found.winner[:, :, at] = winner
            found.top_winner[:, :, at] = score.argmax(-1).to(torch.int32).masked_fill_(empty, -1)
        if margin:
            found.margin[:, :, at] = (best - second).amin(-1).masked_fill_(empty, torch.inf)
    return found


def scores(q: Tensor, k: Tensor) -> Tensor:
    """`max_d (q[i,d] + k[j,d])`, `(B, H, T, S)`, channel by channel: whole sums would be D times as large."""
    q, k = q.mT.contiguous(), k.mT.contiguous()
    score = q[:, :, 0, :, None] + k[:, :, 0, None]
    room = torch.empty_like(score)
    for d in range(1, q.shape[2]):
        torch.add(q[:, :, d, :, None], k[:, :, d, None], out=room)
        torch.maximum(score, room, out=score)
    return score


def offers(
    score: Tensor, v: Tensor, first: int | None, keep: bool, margin: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of `score[i,j] + v[j,d]` over j, who made it, and the second best, `(B, H, T, D)` each.

    Args:
        first: where causal, the number of the first query; earlier queries do not see a key.
    """
    shape = (*score.shape[:3], v.shape[3])
    best, room = score.new_full(shape, -torch.inf), score.new_empty(shape)
    winner = torch.full(shape, -1, dtype=torch.int32, device=v.device)
    second = best.clone()
    score = score.mT.contiguous()
    for key in range(v.shape[2]):
        rows = slice(0 if first is None else max(0, key - first), None)
        old, new = best[:, :, rows], room[:, :, rows]
        torch.add(score[:, :, key, rows, None], v[:, :, key, None], out=new)
        if margin:
            torch.maximum(second[:, :, rows], torch.minimum(old, new), out=second[:, :, rows])
        torch.maximum(old, new, out=new)
        if keep:  # one that is only as good does not win: lowest index
            winner[:, :, rows].masked_fill_(new != old, key)
        old.copy_(new)
    return best, winner, second


def backward(
    grad: Tensor, grad_top: Tensor | None, q: Tensor, k: Tensor, winner: Tensor, top_winner: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: each y has one winner j, and the score of (i, j) has one.

    Args:
        grad: of y, `(B, H, T, D)`.
        grad_top: of the largest scores, `(B, H, T)`.
        winner, top_winner: as of `Best`.
    """
    precise = grad.dtype
    batch, heads, _, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    grad = grad.masked_fill(winner < 0, 0.0)
    at, given = winner.clamp(min=0).long(), grad
    channel = torch.arange(width, device=q.device)
    dv = scattered(at * width + channel, given, keys * width, group)
    if grad_top is not None:
        given = torch.cat((grad, grad_top.masked_fill(top_winner < 0, 0.0)[..., None]), dim=-1)
        at = torch.cat((at, top_winner.clamp(min=0).long()[..., None]), dim=-1)
    inner = channels(q.to(precise), k.to(precise).repeat_interleave(group, dim=1), at)
    dq = torch.zeros(q.shape, dtype=precise, device=q.device)
    dq.scatter_add_(-1, inner, given)
    dk = scattered(at * width + inner, given, keys * width, group)
    shape = (batch, kv_heads, keys, width)
    return dq.to(q.dtype), dk.view(shape).to(k.dtype), dv.view(shape).to(k.dtype)


def channels(q: Tensor, k: Tensor, at: Tensor) -> Tensor:
    """Which channel wins the scores of queries and the keys `at (B, H, T, E)`, the lowest of equal ones."""
    best = torch.full(at.shape, -torch.inf, dtype=q.dtype, device=q.device)
    winner, flat = torch.zeros_like(at), at.flatten(2)
    for d in range(q.shape[3]):
        score = q[..., d, None] + k[..., d].gather(2, flat).view(at.shape)
        higher = torch.maximum(best, score)
        winner.masked_fill_(higher != best, d)
        best = higher
    return winner


def scattered(place: Tensor, given: Tensor, size: int, group: int) -> Tensor:
    """Sums of `given (B, H, T, E)` by `place`, `(B, K, size)`: the same bits in any order of adding."""
    batch, heads = given.shape[:2]
    place, given = (x.reshape(batch, heads // group, -1) for x in (place, given))
    if given.device.type == "cpu":  # adds in order
        return torch.zeros(batch, heads // group, size, dtype=given.dtype).scatter_add_(-1, place, given)
    unit = fixed_unit(given.abs().amax(-1), given.shape[-1]).to(given.dtype)[..., None]
    whole = (given * unit).round().long()
    sums = torch.zeros(batch, heads // group, size, dtype=torch.int64, device=given.device)
    return (sums.scatter_add_(-1, place, whole).double() / unit.double()).to(given.dtype)


def fixed_unit(largest: Tensor, count: int) -> Tensor:
    """What to multiply numbers by before they are rounded to int64, a power of two in float32.

    Integers add up to the same sum in any order, which floating-point numbers do not. `count` numbers of at
    most `largest` fit in 63 bits; with 2^18 of them each is kept to 2^-44 of the largest.

    Args:
        largest: of the numbers' absolute values, any shape; where it is not finite the unit is NaN.
    """
    exponent = torch.frexp(largest.float()).exponent.clamp(min=-60)
    bits = 62 - max(1, count - 1).bit_length()
    power = ((127 + (bits - exponent).clamp(-126, 126)).to(torch.int32) << 23).view(torch.float32)
    return power.masked_fill(~largest.isfinite(), torch.nan)
