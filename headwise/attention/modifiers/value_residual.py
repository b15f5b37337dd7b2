"""`value_residual`: values mixed with those of the first layer (Zhou et al. 2024, arXiv 2410.17897).

    v_l ← λ_l v_l + μ_l v_1,   l > 1

λ and μ are learned, one of each per layer, and start at 1 and 0: the model starts exactly as without them.
The first layer has neither. Its values reach the other layers through the forward pass's `Carry`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.functional.mixing import mixed


class ValueResidual(nn.Module):
    """The weights with which one layer after the first mixes its values."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.empty(()))
        self.first = nn.Parameter(torch.empty(()))

    def initialise(self) -> None:
        """Start at the layer's own values."""
        nn.init.ones_(self.own)
        nn.init.zeros_(self.first)

    def forward(self, v: Tensor, first: Tensor) -> Tensor:
        """Of the layer's values and the first layer's, both `(B, K, T, D)`."""
        return mixed(v, first, self.own, self.first)
