"""Attention whose weights are products of positive features, in time and memory that grow linearly in T.

    w[i,j] = φ(q_i)·φ(k_j) / Σ_l φ(q_i)·φ(k_l)        y_i = Σ_j w[i,j] v_j

The sums over j do not depend on the query: y_i = φ(q_i) S_i / φ(q_i)·z_i with S_i = Σ_j φ(k_j) v_jᵀ and
z_i = Σ_j φ(k_j) (Katharopoulos et al. 2020). The causal form works in blocks of tokens: a query is multiplied
with the keys of its own block one by one, and with one state for all blocks before it.

Letters: `B` batch, `T` tokens, `H` query heads, `K` key/value heads, `R` = H / K, `D` head width, `F`
features, `C` tokens of a block, `N` blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from headwise.functional.running_sum import exclusive_sum

BLOCK = 128
"""C."""

SHIFT, HIGHEST = 40.0, 80.0
"""Added to every exponent of a key's features, and the largest exponent after it.

A shift that all keys share changes no weight, and leaves room below: float32 and bfloat16 reach from e^-87
to e^88. A shift by the largest exponent of the sequence would let a later key change the rounding of an
earlier query.
"""


def elu_features(x: Tensor) -> Tensor:
    """elu(x) + 1 (Katharopoulos et al. 2020), `(…, D)`, at least float32: positive wherever e^x is."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    features: Tensor = torch.where(x > 0, x + 1, x.clamp_max(0).exp())
    return features


def orthogonal_features(n_features: int, width: int, seed: int) -> Tensor:
    """Directions of positive random features: orthogonal in blocks of D, as long as Gaussian ones.

    Args:
        n_features: F.
        width: D.
        seed: what draws them; other random numbers are not touched.

    Returns:
        `(F, D)` float32, each row distributed as a standard normal vector (Choromanski et al. 2021).
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    blocks = []
    for _ in range(math.ceil(n_features / width)):
        gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu")
        q, r = torch.linalg.qr(gaussian)
        blocks.append(q.mT * r.diagonal().sign()[:, None])  # signs make it uniform over rotations
    lengths = torch.randn(n_features, width, generator=generator, dtype=torch.float64, device="cpu").norm(
        dim=-1
    )
    directions: Tensor = torch.cat(blocks)[:n_features] * lengths[:, None]
    return directions.float()


def positive_features(x: Tensor, directions: Tensor, *, scale: float, of_queries: bool) -> Tensor:
    """FAVOR+'s positive features of the softmax kernel (Choromanski et al. 2021), stabilised.

    The mean over directions w of exp(w·x - ‖x‖²/2) · exp(w·y - ‖y‖²/2) is exp(x·y), with x and y the queries
    and keys times √scale. Queries' exponents are shifted by the largest of each, keys' by a constant; both
    cancel in the weights. A key with ‖x‖²/2 above about 120 has no features left that float32 can hold.

    Args:
        x: queries or keys, `(…, D)`.
        directions: `(F, D)`.
        scale: the factor on q·k that softmax attention would have.
        of_queries: whether x are queries.

    Returns:
        `(…, F)`, at least float32.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)) * scale**0.5
    with torch.autocast(x.device.type, enabled=False):
        exponent = x @ directions.to(x.dtype).mT - x.square().sum(-1, keepdim=True) / 2
    if of_queries:
        return (exponent - exponent.amax(-1, keepdim=True).detach()).exp()
    return (exponent + SHIFT).clamp_max(HIGHEST).exp()


def linear_weights(
    phi_q: Tensor, phi_k: Tensor, *, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """w, with every weight in memory: the definition.

    Args:
        phi_q: `(B, H, T, F)`, at least 0.
        phi_k: `(B, K, T, F)` with `H % K == 0`.
        mask: `(B or 1, T, T)` bool, True = may attend.
        causal: query i sees keys j <= i only.

    Returns:
        `(B, H, T, T)`; zeros for a query that may attend to nothing.
    """
    weights = phi_q @ phi_k.repeat_interleave(phi_q.shape[1] // phi_k.shape[1], 1).mT
    weights = weights.tril() if causal else weights
    weights = _precise(weights if mask is None else weights.masked_fill(~mask[:, None], 0))
    return _divided(weights, weights.sum(-1))


def linear_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    real: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    block: int = BLOCK,
) -> Tensor:
    """y of the features of queries and keys.

    Products are made in v's dtype (bfloat16 in place of float16, whose range is too small), sums in float32.

    Args:
        phi_q: `(B, H, T, F)`, at least 0.
        phi_k: `(B, K, T, F)` with `H % K == 0`.
        v: `(B, K, T, D)`.
        real: `(B or 1, T)` bool, keys that count; the others' features are zeroed.
        mask: `(B or 1, T, T)` bool, True = may attend. Under it every weight is in memory.
        causal: query i sees keys j <= i only.
        block: C.

    Returns:
        `(B, H, T, D)`, at least float32; zeros for a query that may attend to nothing.
    """
    dtype = torch.bfloat16 if v.dtype == torch.float16 else v.dtype
    with torch.autocast(v.device.type, enabled=False):
        phi_q, phi_k, v = phi_q.to(dtype), phi_k.to(dtype), v.to(dtype)
        if real is not None:
            phi_k = phi_k * real[:, None, :, None]
        if mask is not None:
            weights = linear_weights(phi_q, phi_k, mask=mask, causal=causal).to(dtype)
            return _precise(weights @ v.repeat_interleave(phi_q.shape[1] // v.shape[1], 1))
        grouped = phi_q.unflatten(1, (phi_k.shape[1], -1))
        y = _causal(grouped, phi_k, v, min(block, v.shape[-2])) if causal else _full(grouped, phi_k, v)
        return y.flatten(1, 2)


def real_keys(mask: Tensor, *, causal: bool) -> Tensor | None:
    """The keys `(B or 1, T)` that queries see, where every query sees the same; None where they differ."""
    visible = mask.tril() if causal else mask
    real = visible.any(-2)
    same = real[:, None].expand_as(visible)
    return real if torch.equal(visible, same.tril() if causal else same) else None


def _full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q `(B, K, R, T, F)`, k `(B, K, T, F)`, v `(B, K, T, D)` to `(B, K, R, T, D)`."""
    state, total = (k.mT @ v)[:, :, None], _precise(k).sum(-2).to(q.dtype)[:, :, None, :, None]
    return _divided(_precise(q @ state), _precise(q @ total)[..., 0])


def _causal(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """As `_full`, each query with the keys up to its own."""
    tokens, ratio = q.shape[-2], q.shape[2]
    missing = -tokens % block
    if missing:  # zero features weigh nothing
        q, k, v = (functional.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    # (B, K, N, R·C, F): the query heads of a key/value head share its products
    q = q.unflatten(-2, (-1, block)).movedim(2, 3).flatten(3, 4)
    k, v = k.unflatten(-2, (-1, block)), v.unflatten(-2, (-1, block))
    weights = (q @ k.mT).unflatten(-2, (ratio, block)).tril().flatten(-3, -2)
    y, total = _precise(weights @ v), _precise(weights).sum(-1)
    if k.shape[2] > 1:
        states = exclusive_sum(_precise(k.mT @ v).flatten(-2)).unflatten(-1, (k.shape[-1], v.shape[-1]))
        totals = exclusive_sum(_precise(k).sum(-2))
        y = y + _precise(q @ states.to(q.dtype))
        total = total + _precise(q @ totals.to(q.dtype)[..., None])[..., 0]
    y = _divided(y, total).unflatten(-2, (ratio, block)).movedim(3, 2)  # (B, K, R, N, C, D)
    whole: Tensor = y.flatten(3, 4)[..., :tokens, :]
    return whole


def _divided(y: Tensor, total: Tensor) -> Tensor:
    """`y (…, N) / total (…)`, zeros where the total is 0."""
    return y / torch.where(total > 0, total, 1).unsqueeze(-1)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
