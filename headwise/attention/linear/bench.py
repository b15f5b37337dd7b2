"""Time of linear attention and random features, forward and backward, beside fused softmax attention.

First checks both against their definitions, with every weight in float64. `compiled` is under torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.bench.scaling import Way, run
from headwise.functional.linear_attention import (
    elu_features,
    linear_attention,
    linear_weights,
    orthogonal_features,
    positive_features,
)

FEATURES = 128


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Features elu(x) + 1, block by block."""
    return linear_attention(elu_features(q), elu_features(k), v).to(v.dtype)


def linear_exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with every weight in memory."""
    return linear_weights(elu_features(q), elu_features(k)) @ v


_drawn: dict[tuple[torch.device, int], Tensor] = {}


def _random(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    width = q.shape[-1]
    key = (q.device, width)
    if key not in _drawn:
        _drawn[key] = orthogonal_features(FEATURES, width, 0).to(q.device)
    scale, directions = width**-0.5, _drawn[key]
    phi_q = positive_features(q, directions, scale=scale, of_queries=True)
    return phi_q, positive_features(k, directions, scale=scale, of_queries=False)


def random_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Random features, block by block."""
    return linear_attention(*_random(q, k), v).to(v.dtype)


def random_features_exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with every weight in memory."""
    return linear_weights(*_random(q, k)) @ v


WAYS: dict[str, tuple[Way, Way]] = {
    "linear": (linear, linear_exact),
    "performer": (random_features, random_features_exact),
}


def main(argv: list[str]) -> int:
    """`headwise bench linear`."""
    return run(argv, "linear", __doc__, WAYS, {name: way for name, (way, _) in WAYS.items()})
