"""Modifiers of attention: additions to the layers of every kind that declares them, one file each.

    qk_norm         an RMSNorm on each head's queries and keys, before the rotation
    sink            one more logit in the softmax's denominator: 0, or learned by each head
    output_gate     heads' outputs times a sigmoid of the layer's input, by head or by channel
    value_residual  values mixed with those of the first layer
    windows         query i sees the last keys alone; a pattern over layers

Each is a key of `model.attention` and off by default. A kind lists its modifiers in `supports`. A modifier
that is off has no parameters and draws no random numbers.
"""

from headwise.attention.modifiers.layer import ModifierLayer
from headwise.attention.modifiers.options import MODIFIERS, Modifiers, window_of

__all__ = ["MODIFIERS", "ModifierLayer", "Modifiers", "window_of"]
