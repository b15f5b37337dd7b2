"""What passes between the layers of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Carry:
    """What the layers of one forward pass hand to the next layer and to the loss.

    Attributes:
        logits: selection logits of the previous layer, `(B, M, T, T)`.
        penalty: what layers so far add to the loss, a scalar.
        values: of the first layer, `(B, K, T, D)`, where later layers mix them in.
    """

    logits: Tensor | None = None
    penalty: Tensor | float = 0.0
    values: Tensor | None = None
