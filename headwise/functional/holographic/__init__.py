"""Holographic attention: points of a Poincaré ball, and holographic reduced representations (HRR).

    u = project(x) = x · tanh(√c·‖x‖) / (√c·‖x‖)
    d(u, v) = arcosh(1 + 2c‖u-v‖² / ((1-c‖u‖²)(1-c‖v‖²))) / √c

HRR (Plate 1995) binds a key with a value by circular convolution, k ⊛ v, which is a product of spectra. The
running sum S_i = Σ_{j<=i} k_j ⊛ v_j holds all pairs in one vector, and correlation with a query reads from
it: v̂_i = q_i ⊛⁻¹ S_i. The spectra of keys and queries have modulus 1, so the inverse is exact: if S holds a
single pair, its key reads its value up to rounding.

Letters: `B` batch, `T` tokens, `H` query heads, `K` key/value heads, `D` head width, `N` = D // 2 + 1
frequencies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.functional.running_sum import running_sum
from headwise.functional.softmax_attention import additive_mask, zero_rows

EPS = 1e-6


def precise(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- the Poincaré ball


def radius(x: Tensor, curvature: Tensor | float, eps: float = EPS) -> Tensor:
    """z = √c·‖x‖ of the vectors x `(…, D)`, `(…, 1)`.

    It is at least √c·eps and at most artanh(1 - eps): gradients stay finite at x = 0, and no point comes
    closer to the boundary than eps of the ball's radius.
    """
    root = torch.as_tensor(curvature, dtype=x.dtype, device=x.device).sqrt()
    norm = x.square().sum(-1, keepdim=True).clamp_min(eps**2).sqrt()
    return (root * norm).clamp_max(math.atanh(1 - eps))


def project(x: Tensor, curvature: Tensor | float, eps: float = EPS) -> Tensor:
    """Map vectors into the ball of curvature -c: x · tanh(√c·‖x‖) / (√c·‖x‖) (Ganea et al. 2018).

    Args:
        x: `(…, D)`.
        curvature: c > 0.
        eps: see `radius`.

    Returns:
        `(…, D)` with √c·‖u‖ <= 1 - eps.
    """
    root = torch.as_tensor(curvature, dtype=x.dtype, device=x.device).sqrt()
    norm = x.square().sum(-1, keepdim=True).clamp_min(eps**2).sqrt()
    return x / norm * radius(x, curvature, eps).tanh() / root


def poincare_scores(q: Tensor, k: Tensor, curvature: Tensor | float, eps: float = EPS) -> Tensor:
    """-d(project(q_i), project(k_j)) of every pair, without a tensor `(…, T, T, D)`.

    Args:
        q, k: `(…, T, D)`, before they are projected.
        curvature: c > 0.
        eps: see `radius`; also the least argument of arcosh above 1, so that gradients are finite at u = v.

    Returns:
        `(…, T, T)`, at least float32, each at most -arcosh(1 + eps) / √c.
    """
    q, k = precise(q), precise(k)
    root = torch.as_tensor(curvature, dtype=q.dtype, device=q.device).sqrt()
    u, v = (project(x, curvature, eps) * root for x in (q, k))
    zu, zv = radius(q, curvature, eps), radius(k, curvature, eps).transpose(-2, -1)
    # in float32 whatever autocast says: near the boundary the difference of two numbers near 1 decides
    with torch.autocast(q.device.type, enabled=False):
        squared = zu.tanh().square() + zv.tanh().square() - 2 * u @ v.transpose(-2, -1)
    # 1 / (1 - tanh² z) = cosh² z exactly, where 1 - tanh² z has lost its digits
    argument = 2 * squared * zu.cosh().square() * zv.cosh().square()
    return -_arcosh_above_one(argument.clamp_min(eps)) / root


def _arcosh_above_one(w: Tensor) -> Tensor:
    """arcosh(1 + w), exact for small w."""
    return torch.log1p(w + (w * (w + 2)).sqrt())


def poincare_weights(
    q: Tensor,
    k: Tensor,
    *,
    curvature: Tensor | float,
    temperature: Tensor | float = 1.0,
    mask: Tensor | None = None,
    causal: bool = True,
    eps: float = EPS,
) -> tuple[Tensor, Tensor | None]:
    """softmax_j(-τ · d(q_i, k_j) + mask), with every score in memory.

    Args:
        q: `(B, H, T, D)`.
        k: `(B, K, T, D)` with `H % K == 0`.
        curvature: c > 0.
        temperature: τ, a number or one a head `(H,)`.
        mask: `(B or 1, T, T)`, bool (True = may attend) or additive float.
        causal: query i sees keys j <= i only.
        eps: see `poincare_scores`.

    Returns:
        weights `(B, H, T, T)`, and the rows that see nothing, as `additive_mask` gives them.
    """
    scores = poincare_scores(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), curvature, eps)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(scores.dtype)[:, None, None]
    scores = scores * temperature
    bias, empty = additive_mask(mask, causal=causal, length=q.shape[-2], like=scores)
    return (scores if bias is None else scores + bias).softmax(-1), empty


def poincare_attention(
    q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0, **how: Tensor | float | bool | None
) -> Tensor:
    """Attention by distance in the Poincaré ball; arguments as of `poincare_weights`, y `(B, H, T, D)`."""
    weights, empty = poincare_weights(q, k, **how)  # type: ignore[arg-type]
    weights = F.dropout(weights.to(v.dtype), dropout, training=dropout > 0)
    return zero_rows(weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), empty)


# --- holographic reduced representations


def unit_spectrum(x: Tensor, eps: float = EPS) -> Tensor:
    """The spectrum of real vectors `(…, D)` with every modulus 1, `(…, N)` complex; 0 where x is 0."""
    unit: Tensor = _Phase.apply(torch.fft.rfft(precise(x)), eps)  # type: ignore[no-untyped-call]
    return unit


class _Phase(torch.autograd.Function):
    """s / max(|s|, eps).

    The gradient of a phase is along the circle. Written as the difference of a quotient's two terms it loses
    its digits where |s| is small, and a few such frequencies decide the whole gradient.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, eps: float) -> Tensor:
        size = s.abs()
        u = s / size.clamp_min(eps)
        ctx.save_for_backward(u, size)
        ctx.eps = eps
        return u

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        u, size = ctx.saved_tensors
        along = 1j * u * (u.conj() * gradient).imag
        return torch.where(size > ctx.eps, along, gradient) / size.clamp_min(ctx.eps), None


def bind(k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    """The spectrum of k ⊛ v with k's of modulus 1: k, v `(…, D)` to `(…, N)` complex."""
    bound: Tensor = unit_spectrum(k, eps) * torch.fft.rfft(precise(v))
    return bound


def unbind(q: Tensor, memory: Tensor, eps: float = EPS) -> Tensor:
    """What a query reads from a memory: q `(…, D)`, memory `(…, N)` complex, to `(…, D)`."""
    found: Tensor = torch.fft.irfft(unit_spectrum(q, eps).conj() * memory, n=q.shape[-1])
    return found


def superpose(bound: Tensor, *, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """The pairs that each query sees, added up.

    Args:
        bound: `(B, K, T, N)` complex.
        mask: `(B or 1, T, T)` bool, True = may attend. Without one nothing of size T x T is made.
        causal: query i sees pairs j <= i only.

    Returns:
        `(B, K, T, N)` complex.
    """
    parts = torch.view_as_real(bound).flatten(-2)
    if mask is not None:
        visible = (mask.tril() if causal else mask)[:, None].to(parts.dtype)
        with torch.autocast(parts.device.type, enabled=False):
            parts = visible @ parts
    elif causal:
        parts = running_sum(parts)
    else:
        parts = parts.sum(-2, keepdim=True).expand_as(parts)
    return torch.view_as_complex(parts.unflatten(-1, (-1, 2)).contiguous())


def retrieve(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = True, eps: float = EPS
) -> Tensor:
    """v̂_i, what query i reads from the superposition of the pairs it sees.

    Args:
        q: `(B, H, T, D)`.
        k, v: `(B, K, T, D)` with `H % K == 0`.
        mask: `(B or 1, T, T)` bool, True = may attend.
        causal: query i sees keys j <= i only.
        eps: least modulus by which a spectrum is divided.

    Returns:
        `(B, H, T, D)`, at least float32. Time O(T·D log D) and memory O(T·D) where no mask is given.
    """
    memory = superpose(bind(k, v, eps), mask=mask, causal=causal)
    grouped = q.unflatten(1, (k.shape[1], -1))
    return unbind(grouped, memory[:, :, None], eps).flatten(1, 2)


def normalised(x: Tensor, eps: float = EPS) -> Tensor:
    """`x (…, D)` with a root mean square of 1; zeros stay zeros."""
    return x / x.square().mean(-1, keepdim=True).add(eps**2).sqrt()


def cosine(v: Tensor, found: Tensor, eps: float = EPS) -> Tensor:
    """cos(v_i, v̂_i) of v `(B, K, T, D)` and v̂ `(B, H, T, D)`, `(B, H, T)`."""
    own = precise(v).repeat_interleave(found.shape[1] // v.shape[1], 1)
    return F.cosine_similarity(own, found, -1, eps)


def own_weight(
    similarity: Tensor, temperature: Tensor, *, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """The running softmax weight of each token: exp(τ·a_i) / Σ_j exp(τ·a_j) over the tokens that i sees.

    Args:
        similarity: a, `(B, H, T)`.
        temperature: τ of each head, `(H,)`.
        mask, causal: as of `retrieve`.

    Returns:
        `(B, H, T)`; 0 for a token that does not see itself.
    """
    logits = similarity * temperature.to(similarity.dtype)[:, None]
    if mask is not None:
        visible = (mask.tril() if causal else mask)[:, None]
        of_keys = logits[:, :, None].expand(-1, -1, logits.shape[-1], -1)
        seen = of_keys.masked_fill(~visible, torch.finfo(logits.dtype).min).logsumexp(-1)
        own = visible.diagonal(dim1=-2, dim2=-1)
        return (logits - torch.where(own, seen, logits)).exp().masked_fill(~own, 0.0)
    seen = logits.logcumsumexp(-1) if causal else logits.logsumexp(-1, keepdim=True)
    return (logits - seen).exp()


def reweighted(v: Tensor, weight: Tensor) -> Tensor:
    """`w_i · v_i` (Alam et al. 2023): v `(B, K, T, D)`, weight `(B, H, T)`, to `(B, H, T, D)`."""
    return precise(v).repeat_interleave(weight.shape[1] // v.shape[1], 1) * weight[..., None]
