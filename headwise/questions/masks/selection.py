"""Which query took how much from which key, and how a kind of attention tells it.

A kind whose queries mask keys names a module as its `inspector`, which has

    selections(model, tokens (1, T)) -> list[Selection]    of every layer that selects
    rules(options) -> Rules                                what attacks may do
    switches(options) -> dict[str, Any]                    what a reader must know of the options
    notes(options) -> list[str]                            what to keep in mind when reading the numbers
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Selection:
    """What the queries of one layer did to its keys. Arrays are `(M, T, T)` float32, 0 above the diagonal.

    Attributes:
        layer: its index.
        attack: S[i,j], what query i takes from key j for later queries, before any protection.
        taken: F[i,j], what was masked of key j before query i came.
        unprotected: F of the same attacks without protection; None where the layer has none.
        heads: for each mask the heads that are under it.
    """

    layer: int
    attack: np.ndarray
    taken: np.ndarray
    unprotected: np.ndarray | None
    heads: list[list[int]]


@dataclass(frozen=True)
class Rules:
    """What attacks may do.

    Attributes:
        protect_bos: nothing masks the first token.
        protect_self: no token masks itself.
        adds_up: whether F is the sum of the attacks.
    """

    protect_bos: bool
    protect_self: bool
    adds_up: bool
