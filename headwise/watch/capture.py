"""Keep the queries, keys and values of chosen layers while a model runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headwise.attention.observation import Observation, Scores, by_part
from headwise.measures.collector import ScoresFrom


@dataclass
class Capture:
    """What `watch` hands over of layers besides their measures.

    Attributes:
        layers: which layers to keep.
        scores: whether q and k are kept as after the rotation or before it.
        tensors: `layer_03.q` `(B, H, T, D)`, `layer_03.k` and `layer_03.v` `(B, K, T, D)`, in parts. Heads
            with several softmaxes have `layer_03.part_1.q` and so on, and one `layer_03.v`.
        n_layers: layers seen so far.
    """

    layers: frozenset[int]
    scores: ScoresFrom = "post_rope"
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)
    n_layers: int = 0

    @torch.no_grad()
    def take(self, layer: int, seen: Observation, v: Tensor) -> None:
        """Keep q, k and v of one layer in one forward pass, if it is one of the chosen."""
        self.n_layers = max(self.n_layers, layer + 1)
        if layer not in self.layers:
            return
        found: dict[str, Tensor] = {}
        for part, scores in by_part(seen):
            if isinstance(scores, Scores):
                found |= self._of(scores, f"part_{part}." if part else "")
        for name, tensor in (found | {"v": v}).items() if found else ():
            self.tensors.setdefault(f"layer_{layer:02d}.{name}", []).append(tensor.detach())

    def _of(self, seen: Scores, prefix: str) -> dict[str, Tensor]:
        q, k = seen.q, seen.k
        if self.scores == "pre_rope" and seen.q_pre is not None and seen.k_pre is not None:
            q, k = seen.q_pre, seen.k_pre
        return {f"{prefix}q": q, f"{prefix}k": k}

    def pop(self) -> dict[str, Tensor]:
        """What was kept since the last call, whole along B."""
        kept = {name: torch.cat(parts).contiguous() for name, parts in self.tensors.items()}
        self.tensors = {}
        return kept

    def unknown(self) -> Iterable[int]:
        """Chosen layers that the model does not have, once it has run."""
        return sorted(layer for layer in self.layers if layer >= self.n_layers)
