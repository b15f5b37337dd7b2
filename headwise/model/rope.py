"""Rotary position embedding (Su et al. 2021), in the half-split convention of GPT-NeoX and Llama."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headwise.functional.rotation import rotated


class Rope(nn.Module):
    """Rotates q and k by their positions. Tables grow with the longest sequence seen.

    Pair d is the coordinates d and d + D/2; at position t it turns by t · theta^(-2d/D).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, theta: float = 10_000.0, length: int = 1024) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; RoPE rotates pairs and needs an even one")
        self.head_dim, self.theta = head_dim, theta
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.extend(length)

    def extend(self, length: int) -> None:
        """Make the tables reach `length` positions: computed in float64, kept in float32 or better."""
        frequency = self.theta ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        angle = torch.cat((angle, angle), dim=-1)
        dtype = torch.promote_types(self.cos.dtype, torch.float32)
        self.cos = angle.cos().to(self.cos.device, dtype)
        self.sin = angle.sin().to(self.sin.device, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rope:
        """Move with the model, but compute the tables anew: `model.bfloat16()` must not round them."""
        super()._apply(fn, recurse)
        self.extend(self.cos.shape[0])
        return self

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q `(B, H, T, D)` and k `(B, K, T, D)`; token t is at position t."""
        tables = self._tables(q)
        return rotated(q, tables), rotated(k, tables)

    def after_norms(self, q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor) -> tuple[Tensor, Tensor]:
        """The same of q and k that are normalised first, with the weights `(D,)` of their norms."""
        tables = self._tables(q)
        return rotated(q, tables, q_norm), rotated(k, tables, k_norm)

    def _tables(self, q: Tensor) -> tuple[Tensor, Tensor]:
        length = q.shape[-2]
        if length > self.cos.shape[0]:
            self.extend(length)
        dtype = torch.promote_types(q.dtype, torch.float32)
        return self.cos[:length].to(dtype), self.sin[:length].to(dtype)
