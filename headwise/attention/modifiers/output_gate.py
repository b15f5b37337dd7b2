"""`output_gate`: heads' outputs times a sigmoid of the layer's input (Qiu et al. 2025; Qwen3-Next).

    y_h ← y_h · sigmoid(W_g x)

with one number a head (`head`) or one a channel (`element`). W_g has no bias and starts at 0, so that every
gate starts at 1/2. The output projection starts doubled, so that the model starts exactly as without gates;
where that projection is a product of parameters, to rounding.

The measure `gate` is the mean gate of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.attention.projection import Projection
from headwise.functional.mixing import gated


class OutputGate(nn.Module):
    """The gates of a layer.

    Args:
        d_model: width of the layer's input.
        n_heads: H.
        width: numbers a head: 1, or D.
    """

    def __init__(self, d_model: int, n_heads: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(d_model, n_heads * width, bias=False)

    @torch.no_grad()
    def initialise(self, out: nn.Module) -> None:
        """Start every gate at 1/2, and double the freshly drawn output projection `out`."""
        nn.init.zeros_(self.project.weight)
        if isinstance(out, nn.Linear):
            out.weight.mul_(2)
        elif isinstance(out, Projection):
            out.rescale(2)

    def of(self, x: Tensor) -> Tensor:
        """The gates of `x (B, T, d_model)`, `(B, H, T, 1 or D)`."""
        return torch.sigmoid(self._logits(x))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Heads' outputs `y (B, H, T, D)`, gated by the layer's input `x (B, T, d_model)`."""
        return gated(y, self._logits(x))

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.project(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        return logits
