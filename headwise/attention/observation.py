"""The five forms of what an attention layer offers to be measured.

A layer computes; an observer measures. While no observer is attached nothing of this is built. `extra`
holds measures that the layer computes itself, `(B, H, T)` by the name of a registered measure (see
`headwise.measures.spec`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Weights are a softmax of `scale · q·k + bias` (soft-capped first where `softcap` is set).

    Attributes:
        q: queries as they enter the scores, `(B, H, T, D)`.
        k: keys, `(B, K, T, D)` with `H % K == 0`.
        scale: factor on q·k.
        causal: query i sees keys j <= i only.
        bias: additive mask, `(B or 1, H or 1, T, T)`; -inf where a key is not visible.
        softcap: logits become `softcap · tanh(logits / softcap)`.
        window: query i sees keys j > i - window only.
        key_mask: `(B, T)`, True where a key is real and not padding.
        q_pre: queries before rotation, `(B, H, T, D)`, q itself where nothing is rotated; None = not known.
        k_pre: keys before rotation, `(B, K, T, D)`.
        taken: F, how much of key j was masked before query i came, `(B, 1 or H, T, T)`, for kinds whose
            queries mask keys; `bias` already has -F.
    """

    q: Tensor
    k: Tensor
    scale: float
    causal: bool = True
    bias: Tensor | None = None
    softcap: float | None = None
    window: int | None = None
    key_mask: Tensor | None = None
    q_pre: Tensor | None = None
    k_pre: Tensor | None = None
    taken: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """Explicit weights `(B, H, T, T)` of the first `window` tokens, for kinds without a softmax of q·k."""

    weights: Tensor
    window: int
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Margins:
    """Tropical margins γ, `(B, H, T)`; +inf where fewer than two keys are visible."""

    margin: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Values:
    """Measures that the layer computes itself, and nothing else to be measured."""

    extra: Mapping[str, Tensor]


@dataclass(frozen=True)
class Unmeasured:
    """Nothing to measure, and why."""

    reason: str


Observation = Scores | Weights | Margins | Values | Unmeasured
Observer = Callable[[Observation], None]
