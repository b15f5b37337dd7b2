"""The definition of selective attention (Leviathan, Kalman, Matias 2024, arXiv 2410.02703; docs/sources.md).

    L[i,j] = selection logits, 0 for j > i
    S = act(L), 0 where a key is protected             what query i takes from key j, for later queries
    F[i,j] = Σ_{l<i} S[l,j]                             or the game of attack and protection
    y_i = Σ_j softmax_j(scale · q_i·k_j - F[i,j]) v_j

Letters: `B` batch, `T` tokens, `H` query heads, `K` key/value heads, `D` head width, `M` masks, shared
by groups of heads, `E` width of a selection query.

`selection` and `selective_attention` hand over to the kernels of this folder where these fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.functional.dispatch import WIDEST_HEAD, fits_kernel
from headwise.functional.layout import padded
from headwise.functional.selective.scan import after_the_query, attack_and_protect, running_sum
from headwise.functional.sharing import kept_context, mask_of_head, per_head
from headwise.functional.softmax_attention import softmax_with_sink

WIDEST_SELECTION = 1 << 14


@dataclass(frozen=True)
class Protection:
    """Protection of keys, `p = relu(scale · relu(slope · x + offset) + bias)`.

    Attributes:
        q: queries of the protecting logits x, `(B, M or 1, T, E)`; x = 0 where not given.
        k: their keys, `(B, M or 1, T, E)`.
        qk_scale: factor on q·k.
        qk_bias: added to it, `(M,)`; the kernel takes none.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    qk_scale: float = 1.0
    qk_bias: Tensor | None = None
    slope: float = 1.0
    offset: float = 0.0
    scale: float = 1.0
    bias: float = 0.0

    def of(self, like: Tensor) -> Tensor:
        """p, `(B, M or 1, T, T)` in the precision of `like (B, M, T, T)`, 0 above the diagonal."""
        x = torch.zeros_like(like[:, :1])
        if self.q is not None and self.k is not None:
            q, k = (self.q.double(), self.k.double()) if like.dtype == torch.float64 else (self.q, self.k)
            x = selection_logits(q, k, scale=self.qk_scale, bias=self.qk_bias)
        return self.strength(x).tril()

    def strength(self, x: Tensor) -> Tensor:
        """p of protecting logits of any shape."""
        return (self.scale * (self.slope * x + self.offset).relu() + self.bias).relu()


def selection(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    protection: Protection | None = None,
    protect_bos: bool = True,
    protect_self: bool = True,
    relu_leak: float = 0.0,
    relu_after_cumsum: bool = False,
    accumulate: str = "fused",
) -> Tensor:
    """F of selection queries and keys: `selection_logits`, then `selection_mask`.

    Args:
        q, k, scale, bias: as `selection_logits` takes them.
        protection: a game against the attacks; None for the plain running sum.
        accumulate: `fused` (the kernel where it fits, otherwise torch), `torch`, `sequential`, or
            `float64`, in which logits are computed too.

    Returns:
        `(B, M, T, T)` float32 or better; of the kernel's, only what lies on and below the diagonal counts.
        A query whose logits are NaN takes nothing in the kernel; the definition makes later rows NaN.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    switches: dict[str, Any] = {
        "protect_bos": protect_bos, "protect_self": protect_self, "relu_leak": relu_leak,
    }  # fmt: skip
    _check_selection(q, k)
    guards = (protection.q, protection.k) if protection is not None else ()
    biased = protection is not None and protection.qk_bias is not None
    alike = _one_dtype(q, k, *guards)
    if accumulate == "fused" and not biased and alike and fits_kernel(q, WIDEST_SELECTION):
        return _fused(q, k, scale, bias, protection, relu_after_cumsum, **switches)
    if accumulate == "float64":
        q, k = q.double(), k.double()
    logits = selection_logits(q, k, scale=scale, bias=bias)
    return selection_mask(
        logits,
        protection.of(logits) if protection else None,
        relu_after_cumsum=relu_after_cumsum,
        accumulate="torch" if accumulate == "fused" else accumulate,
        **switches,
    )


def _fused(
    q: Tensor,
    k: Tensor,
    scale: float,
    bias: Tensor | None,
    protection: Protection | None,
    after: bool,
    *,
    protect_bos: bool,
    protect_self: bool,
    relu_leak: float,
) -> Tensor:
    from headwise.functional.selective.kernel_mask import selection_mask as kernel

    guard: list[float] = []
    guard_q = guard_k = None
    guard_scale = 1.0
    if protection is not None:
        guard_q, guard_k, guard_scale = protection.q, protection.k, protection.qk_scale
        guard = [protection.slope, protection.offset, protection.scale, protection.bias]
        if guard_q is None or guard_k is None:
            guard_q = guard_k = None
            guard[0] = 0.0  # x = 0, whatever the kernel reads in its place
        else:
            _check_selection(guard_q, guard_k, like=q)
    bias = None if bias is None else bias.expand(q.shape[1])
    taken: Tensor = kernel(
        q, k, bias, guard_q, guard_k, scale, guard_scale, relu_leak, guard, protect_bos, protect_self, after
    )[0]
    return taken


def selection_logits(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """`scale · q_i·k_j + bias`, and 0 for j > i, in float32 or better.

    Args:
        q: selection queries `(B, M, T, E)`.
        k: selection keys `(B, M or 1, T, E)`.
        bias: `(M,)`.

    Returns:
        `(B, M, T, T)`.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        logits = q.to(precise) @ k.to(precise).transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + bias[:, None, None]
    return logits.tril()


def attacks(
    logits: Tensor, *, protect_bos: bool = True, protect_self: bool = True, relu_leak: float = 0.0
) -> Tensor:
    """S: what each query takes from each key; arguments and shapes as in `selection_mask`."""
    attack = torch.where(logits > 0, logits, relu_leak * logits) if relu_leak else logits.relu()
    attack = attack.tril(-1 if protect_self else 0)
    if protect_bos:
        attack = torch.cat((torch.zeros_like(attack[..., :1]), attack[..., 1:]), dim=-1)
    return attack


def selection_mask(
    logits: Tensor,
    protection: Tensor | None = None,
    *,
    protect_bos: bool = True,
    protect_self: bool = True,
    relu_leak: float = 0.0,
    relu_after_cumsum: bool = False,
    accumulate: str = "torch",
) -> Tensor:
    """F: how much of key j was taken before query i came.

    Args:
        logits: `(B, M, T, T)`, 0 above the diagonal (`selection_logits`).
        protection: p >= 0, `(B, M or 1, T, T)`, 0 above the diagonal; None for the plain running sum.
        protect_bos: no query takes anything from key 0.
        protect_self: no query takes anything from its own key.
        relu_leak: slope of the activation below 0.
        relu_after_cumsum: apply another ReLU to F.
        accumulate: `torch`, `float64` or `sequential` (`running_sum`).

    Returns:
        `(B, M, T, T)`, 0 in row 0, on the diagonal and above.
    """
    attack = attacks(logits, protect_bos=protect_bos, protect_self=protect_self, relu_leak=relu_leak)
    if protection is None:
        damage = running_sum(attack, accumulate)
    else:
        damage = attack_and_protect(attack, protection, accumulate)
    taken = after_the_query(damage)
    return taken.relu() if relu_after_cumsum else taken


def selective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    sink: Tensor | None = None,
    fused: bool = True,
) -> Tensor:
    """Causal softmax attention under F; the softmax runs in float32 for half-precision inputs.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, K, T, D)` with `H % K == 0`.
        mask: F, `(B or 1, M, T, T)`; masks go to heads as `mask_of_head` says.
        scale: factor on q·k, `D**-0.5` unless given.
        sink: logits `(H,)`, one more in each query's denominator; None where there is none.
        fused: use the kernel where it fits; otherwise the definition, with every score in memory.

    Returns:
        `(B, H, T, D)`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check_heads(q, k, v)
    batch, heads, tokens, _ = q.shape
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[2:] != (tokens, tokens):
        raise ValueError(f"F must be (B or 1, M, T, T), got {tuple(mask.shape)} for q {tuple(q.shape)}")
    mask_of_head(heads, mask.shape[1])
    if fused and _one_dtype(q, k, v) and k.shape == v.shape and fits_kernel(q):
        mask = mask.to(torch.float32).expand(batch, -1, -1, -1).contiguous()
        if sink is not None:
            from headwise.functional.selective.kernel_sink import masked_attention_with_sink

            sunk: Tensor = masked_attention_with_sink(q, k, v, mask, sink, scale)[0]
            return sunk
        from headwise.functional.selective.kernel_masked import masked_attention

        y: Tensor = masked_attention(q, k, v, mask, scale)[0]
        return y
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-2, -1)).to(mask.dtype) * scale - per_head(mask, q.shape[1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1) if sink is None else softmax_with_sink(scores, sink)
    return weights.to(v.dtype) @ v


def own_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select_q: Tensor,
    select_k: Tensor,
    *,
    scale: float,
    select_scale: float,
    bias: Tensor | None = None,
    protect_bos: bool = True,
    protect_self: bool = True,
    relu_leak: float = 0.0,
    relu_after_cumsum: bool = False,
    fused: bool = True,
) -> Tensor:
    """`selection`, and `selective_attention` under it, where every head has a mask of its own.

    The kernel makes F tile by tile and keeps none of it; `fits_own_masks` says when it can be used.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, K, T, D)`.
        select_q: `(B, H, T, E)`.
        select_k: `(B, H or 1, T, E)`.
        bias: of the selection logits, `(H,)`.

    Returns:
        `(B, H, T, D)`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_heads(q, k, v)
    _check_selection(select_q, select_k, like=q)
    alike = _one_dtype(q, k, v, select_q, select_k) and k.shape == v.shape
    if fused and alike and fits_own_masks(q, select_q):
        bias = None if bias is None else bias.expand(q.shape[1])
        from headwise.functional.selective.kernel_own_mask import own_mask_attention as kernel

        switches = (relu_leak, protect_bos, protect_self, relu_after_cumsum)
        y: Tensor = kernel(q, k, v, select_q, select_k, bias, scale, select_scale, *switches)[0]
        return y
    mask = selection(
        select_q, select_k, scale=select_scale, bias=bias, protect_bos=protect_bos,
        protect_self=protect_self, relu_leak=relu_leak, relu_after_cumsum=relu_after_cumsum,
        accumulate="fused" if fused else "torch",
    )  # fmt: skip
    return selective_attention(q, k, v, mask, scale=scale, fused=fused)


def fits_own_masks(q: Tensor, select_q: Tensor) -> bool:
    """Whether the kernel of `own_mask_attention` takes these: its tiles hold both widths in shared memory."""
    narrow = fits_kernel(q) and fits_kernel(select_q)
    wide = q.dtype == torch.float32 and padded(q.shape[-1]) + padded(select_q.shape[-1]) > WIDEST_HEAD
    return narrow and not wide and select_q.shape[1] == q.shape[1]


def _one_dtype(*tensors: Tensor | None) -> bool:
    return len({x.dtype for x in tensors if x is not None}) == 1


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q must be (B, H, T, D), k and v (B, K, T, D); {shapes}")
    batch, heads, tokens, width = q.shape
    if k.shape[::2] != (batch, tokens) or k.shape[3] != width or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q, k and v must agree in B, T and D; {shapes}")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"query heads must be divisible by key/value heads; {shapes}")


def _check_selection(q: Tensor, k: Tensor, like: Tensor | None = None) -> None:
    """Refuse selection queries and keys that do not fit each other, or `like (B, M, T, ·)`."""
    shapes = f"got queries {tuple(q.shape)}, keys {tuple(k.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"selection queries must be (B, M, T, E), their keys (B, M or 1, T, E); {shapes}")
    if q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3] or k.shape[1] not in (1, q.shape[1]):
        raise ValueError(f"selection queries and keys must agree in B, M (or 1), T and E; {shapes}")
    if like is not None and (q.shape[::2] != like.shape[::2] or q.shape[1] not in (1, like.shape[1])):
        raise ValueError(f"{shapes}, which do not fit {tuple(like.shape)} in B, M (or 1) and T")


def memory_penalty(mask: Tensor, *, tau: float = 1.0, reduce: str = "max") -> Tensor:
    """The most (or the mean, `reduce="mean"`) of `kept_context` over queries, as a share of T; a scalar."""
    held = kept_context(mask, tau)
    held = held.amax(-1) if reduce == "max" else held.mean(-1)
    return held.mean() / mask.shape[-1]
