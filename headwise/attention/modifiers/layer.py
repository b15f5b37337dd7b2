"""The modifiers of one attention layer, as its base class calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headwise.attention.modifiers.options import Modifiers
from headwise.attention.modifiers.output_gate import OutputGate
from headwise.attention.modifiers.qk_norm import QKNorm
from headwise.attention.modifiers.sink import Sink
from headwise.attention.modifiers.value_residual import ValueResidual

if TYPE_CHECKING:
    from headwise.attention.base import AttentionShape, Carry

Ranges = dict[int, list[tuple[int, int]]]


class ModifierLayer(nn.Module):
    """The modifiers of one layer.

    Args:
        shape: the layer's, `shape.modifiers` included.
    """

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        on = shape.modifiers
        self.window, self.layer = on.window, shape.layer
        self.hands_on_values = on.value_residual
        with torch.random.fork_rng(devices=[]):  # what is added shifts no other draw of a model
            self.qk_norm = QKNorm(shape.head_dim) if on.qk_norm else None
            self.sink = None if on.sink == "none" else Sink(shape.n_heads, learned=on.sink == "learned")
            width = 1 if on.output_gate == "head" else shape.head_dim
            gated = on.output_gate != "none"
            self.gate = OutputGate(shape.d_model, shape.n_heads, width) if gated else None
            self.value_residual = ValueResidual() if on.value_residual and shape.layer > 0 else None

    def initialise(self, out: nn.Module) -> None:
        """Set the parameters to their start.

        Args:
            out: the layer's output projection, freshly drawn.
        """
        for part in (self.qk_norm, self.sink, self.value_residual):
            if part is not None:
                part.initialise()
        if self.gate is not None:
            self.gate.initialise(out)

    def values(self, v: Tensor, carry: Carry) -> Tensor:
        """v `(B, K, T, D)` mixed with the first layer's, which hands them on in `carry`."""
        if not self.hands_on_values:
            return v
        if self.value_residual is None:
            carry.values = v
            return v
        if carry.values is None:
            raise ValueError(
                f"layer {self.layer} needs the first layer's values, but its carry has none: "
                "run the first layer before it, with the same carry"
            )
        mixed: Tensor = self.value_residual(v, carry.values)
        return mixed

    def outputs(self, x: Tensor, y: Tensor) -> Tensor:
        """Heads' outputs `y (B, H, T, D)`, gated by the layer's input `x (B, T, d_model)`."""
        if self.gate is None:
            return y
        gated: Tensor = self.gate(x, y)
        return gated

    @torch.no_grad()
    def measures(self, x: Tensor) -> dict[str, Tensor]:
        """What the modifiers add to what the layer offers to an observer, `(B, H, T)` each."""
        return {} if self.gate is None else {"gate": self.gate.of(x).float().mean(-1)}


def head_ranges(leaf: str, index: int, modifiers: Modifiers, head_dim: int) -> Ranges:
    """The ranges of a head in a modifier's parameter; as `Attention.head_ranges`.

    Args:
        leaf: the parameter's name below `modifiers.`.
    """
    if leaf == "sink.logit":
        return {0: [(index, index + 1)]}
    if leaf == "gate.project.weight":
        width = 1 if modifiers.output_gate == "head" else head_dim
        return {0: [(index * width, (index + 1) * width)]}
    return {}
