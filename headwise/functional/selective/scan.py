"""Running sums over queries, and the game of attack and protection (selective attention log) beyond them.

Both run over dimension -2 of `(…, T, T)` tensors, whose entry [i, j] is what query i does to key j.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SUMS = ("torch", "sequential", "float64")
"""How a running sum is accumulated in plain PyTorch."""


def running_sum(x: Tensor, accumulate: str = "torch") -> Tensor:
    """Inclusive sum over dimension -2.

    Args:
        x: `(…, T, T)`.
        accumulate: `torch` (its cumsum), `float64` (the same, the result rounded once at the end), or
            `sequential` (row after row in x's own precision: the log's first kernel, the least exact).

    Raises:
        ValueError: another way of accumulating.
    """
    if accumulate == "torch":
        return x.cumsum(-2)
    if accumulate == "float64":
        return x.double().cumsum(-2).to(x.dtype)
    if accumulate == "sequential":
        total: Tensor = _SequentialSum.apply(x)  # type: ignore[no-untyped-call]
        return total
    raise ValueError(f"accumulate is {accumulate!r}; it is one of {', '.join(SUMS)}")


def attack_and_protect(attack: Tensor, protection: Tensor, accumulate: str = "torch") -> Tensor:
    """Damage done to every key up to and including each query's turn.

    In turn i query i attacks with a_i, then protects with p_i. With P the protection a key has left:

        damage = max(a_i - P, 0);  P = max(P - a_i, 0);  F_i = F_{i-1} + damage;  then P += p_i

    Attacks minus protections so far, X_i = Σ_{l<=i} (a_l - p_{l-1}), only do damage where they exceed
    what they ever came to before, so F_i = max(0, max_{l<=i} X_l). Of equal maxima the latest gets the
    gradient: a key whose protection equals the attack counts as vulnerable.

    Args:
        attack: `(…, T, T)`, a >= 0.
        protection: broadcasts with `attack`, p >= 0.
        accumulate: as `running_sum` takes it.

    Returns:
        F, `(…, T, T)`; it never decreases along queries.
    """
    before = F.pad(protection, (0, 0, 1, 0))[..., :-1, :]
    balance = running_sum(attack - before, accumulate)
    return balance.cummax(-2).values.clamp(min=0)


def after_the_query(damage: Tensor) -> Tensor:
    """An inclusive scan over queries made exclusive: what was done before query i."""
    return F.pad(damage, (0, 0, 1, 0))[..., :-1, :]


class _SequentialSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _add_rows(x, range(1, x.shape[-2]), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _add_rows(grads[0], range(grads[0].shape[-2] - 2, -1, -1), -1)


def _add_rows(x: Tensor, rows: range, step: int) -> Tensor:
    total = x.clone()
    for row in rows:
        total[..., row, :] += total[..., row - step, :]
    return total
