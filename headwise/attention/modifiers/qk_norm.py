"""`qk_norm`: an RMSNorm with a learned weight on each head's queries and keys (Henry et al. 2020; Qwen3).

    q_i ← w_q * q_i / rms(q_i)      k_j ← w_k * k_j / rms(k_j)

before the rotation. The weights have width D and are shared by all heads of the layer. They start at 1: every
query and key then has norm √D, so the model does not start as the model without the norms. The measure
`query_norm` uses the normalised queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.functional.rotation import rotated


class QKNorm(nn.Module):
    """The two norms of a layer.

    Args:
        head_dim: D.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.empty(head_dim))
        self.k = nn.Parameter(torch.empty(head_dim))

    def initialise(self) -> None:
        """Start both weights at 1."""
        nn.init.ones_(self.q)
        nn.init.ones_(self.k)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q `(B, H, T, D)` and k `(B, K, T, D)` normalised, in their own dtype."""
        return rotated(q, weight=self.q), rotated(k, weight=self.k)
