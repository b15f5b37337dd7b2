"""`sink`: one more logit in the softmax's denominator, whose weight goes to no key (Miller 2023; GPT-OSS).

    y_i = Σ_j exp(s[i,j]) v_j / (exp(c) + Σ_l exp(s[i,l]))

`zero` has c = 0 for every head, `learned` one c per head, which also starts at 0. Neither starts as the model
without a sink: that is c = -∞, where the gradient of c is 0.

The measure `null_weight` is the sink's share, exp(c) / (exp(c) + Σ_l exp(s[i,l])). All other measures use the
weights over the keys, normalised to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Sink(nn.Module):
    """The sinks of a layer's heads.

    Args:
        n_heads: H.
        learned: whether they are learned; otherwise they are 0.
    """

    logit: Tensor

    def __init__(self, n_heads: int, *, learned: bool) -> None:
        super().__init__()
        if learned:
            self.logit = nn.Parameter(torch.empty(n_heads))
        else:
            self.register_buffer("logit", torch.zeros(n_heads), persistent=False)

    def initialise(self) -> None:
        """Start every sink at 0."""
        nn.init.zeros_(self.logit)
