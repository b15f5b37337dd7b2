"""Holographic attention as it is written down, for tests: every pair, every index, every difference."""

from __future__ import annotations

import torch
from torch import Tensor


def circular_convolution(a: Tensor, b: Tensor) -> Tensor:
    """(a ⊛ b)_n = Σ_m a_m b_{(n-m) mod D} along the last axis."""
    width = a.shape[-1]
    index = torch.arange(width, device=a.device)
    products: Tensor = a[..., None, :] * b[..., (index[:, None] - index) % width]
    return products.sum(-1)


def circular_correlation(a: Tensor, b: Tensor) -> Tensor:
    """(a ⊛⁻¹ b)_n = Σ_m a_m b_{(n+m) mod D}: it undoes `circular_convolution` with a of unit spectrum."""
    width = a.shape[-1]
    index = torch.arange(width, device=a.device)
    products: Tensor = a[..., None, :] * b[..., (index[:, None] + index) % width]
    return products.sum(-1)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x (…, D)` with every modulus of its spectrum 1."""
    spectrum = torch.fft.fft(x)
    found: Tensor = torch.fft.ifft(spectrum / spectrum.abs().clamp_min(eps)).real
    return found


def retrieve(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """v̂_i = Σ_j visible[i,j] · (q_i ⊛⁻¹ (k_j ⊛ v_j)), pair by pair.

    Args:
        q, k, v: `(B, H, T, D)`.
        visible: `(B or 1, 1, T, T)` bool.
    """
    bound = circular_convolution(unit(k), v)
    each = circular_correlation(unit(q)[:, :, :, None], bound[:, :, None])  # (B, H, T, T, D)
    return (each * visible[..., None]).sum(-2)


def poincare_distance(u: Tensor, v: Tensor, curvature: float) -> Tensor:
    """arcosh(1 + 2c‖u-v‖² / ((1-c‖u‖²)(1-c‖v‖²))) / √c of points u, v `(…, D)` of the ball."""
    apart = (u - v).square().sum(-1)
    inside = [1 - curvature * x.square().sum(-1) for x in (u, v)]
    distance: Tensor = torch.arccosh(1 + 2 * curvature * apart / (inside[0] * inside[1])) / curvature**0.5
    return distance
