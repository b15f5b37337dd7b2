"""Time of holographic attention, forward and backward, beside fused softmax attention.

First checks both forms against their definitions in float64. `compiled` is the superposition under
torch.compile. The form with distances needs T x T numbers; its time is NaN where memory does not suffice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.attention.base import AttentionShape
from headwise.attention.holo.config import HoloConfig
from headwise.attention.holo.layer import HoloAttention
from headwise.bench.scaling import Way, run
from headwise.functional.holographic import normalised, own_weight, project, reference, retrieve, reweighted


def layer_way(**options: object) -> Way:
    """The core of a layer, made once for each dtype, device and shape of heads."""
    made: dict[tuple[object, ...], HoloAttention] = {}

    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, width = q.shape[1], q.shape[3]
        key = (q.device, q.dtype, heads, width)
        if key not in made:
            shape = AttentionShape(heads * width, heads, heads, width)
            made[key] = HoloAttention(shape, HoloConfig(**options)).to(q.device)  # type: ignore[arg-type]
        return made[key].core(q, k, v, mask=None, causal=True)

    return way


def _visible(q: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], q.shape[-2], device=q.device, dtype=torch.bool).tril()[None, None]


def _retrieved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum over pairs, one query after the other: the pairs of all at once do not fit."""
    visible = _visible(q)
    bound = reference.circular_convolution(reference.unit(k), v)
    rows = [
        reference.circular_correlation(reference.unit(q[:, :, i]), (bound * visible[0, 0, i, :, None]).sum(2))
        for i in range(q.shape[2])
    ]
    return torch.stack(rows, 2)


def _retrieve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return normalised(_retrieved(q, k, v))


def _reweight(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = _retrieved(q, k, v)
    similarity = torch.nn.functional.cosine_similarity(v, found, -1)
    one = torch.ones(q.shape[1], dtype=q.dtype, device=q.device)
    return reweighted(v, own_weight(similarity, one, mask=_visible(q)[0]))


def _gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (0.5 * q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(~_visible(q), -torch.inf)
    y: Tensor = s.softmax(-1) @ v
    return y


def _by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    u, w = project(0.5 * q, 1.0), project(k, 1.0)
    rows = [reference.poincare_distance(u[:, :, i, None], w, 1.0) for i in range(q.shape[2])]
    return (-torch.stack(rows, 2)).masked_fill(~_visible(q), -torch.inf).softmax(-1) @ v


WAYS: dict[str, tuple[Way, Way]] = {
    "boundary": (layer_way(), _gated),
    "boundary, poincare": (layer_way(poincare=True), _by_distance),
    "hrr, retrieve": (layer_way(form="hrr"), _retrieve),
    "hrr, reweight": (layer_way(form="hrr", read="reweight"), _reweight),
}


def _superposition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return normalised(retrieve(q, k, v)).to(v.dtype)


def main(argv: list[str]) -> int:
    """`headwise bench holo`."""
    return run(argv, "holo", __doc__, WAYS, {"hrr, retrieve": _superposition})
