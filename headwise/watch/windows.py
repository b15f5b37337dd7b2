"""Measures of a window: of the whole weight matrix of each head, on tokens that the model reads alone.

Any layer whose observation gives weights (`Scores` or `Weights`) has them; the others say why not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.attention.observation import Observation, Unmeasured
from headwise.functional.entanglement import entanglement_entropy, regional_entropy
from headwise.measures.collector import Collector
from headwise.measures.spec import WINDOW_MEASURES
from headwise.watch.maps import weights_of
from headwise.watch.observe import attached

MASS = 0.9
AT_ONCE = 1 << 24
"""Weights `(B, H, W, W)` of one layer in one pass, at most, where the heads are few."""
USUAL_HEADS = 16


@dataclass
class Windows(Collector):
    """Gathers the measures of windows, a mean over windows for each layer and head.

    Attributes:
        n_regions: of the regional form.
    """

    n_regions: int = 4

    @torch.no_grad()
    def add(self, layer: int, observation: Observation) -> None:
        """Measure one layer of one forward pass."""
        weights = weights_of(observation)
        if weights is None:
            unmeasured = isinstance(observation, Unmeasured)
            offered = f"it offers {type(observation).__name__.lower()} and no attention weights"
            self.reasons[layer] = observation.reason if unmeasured else offered  # type: ignore[union-attr]
            return
        values = {
            "entanglement": entanglement_entropy(weights),
            "regional_entanglement": regional_entropy(weights, self.n_regions).mean(-1),
            "sparsity": sparsity(weights),
        }
        with self._lock:
            self._accumulate(
                (layer, ""), {name: value[..., None] for name, value in values.items()}, None, None
            )


def sparsity(weights: Tensor) -> Tensor:
    """`1 - k_eff_i / i`, the mean over the queries i > 1 of a window.

    k_eff is the fewest keys whose largest weights, as absolute values, sum to 0.9 of all; i counts the keys
    up to the query, or all W where a weight lies on a later key.

    Args:
        weights: `(B, H, W, W)`.

    Returns:
        `(B, H)` float64; NaN where a window has no query with weights.
    """
    size = weights.shape[-1]
    largest = weights.abs().double().sort(-1, descending=True).values
    total = largest.sum(-1)
    k_eff = (largest.cumsum(-1) < MASS * total[..., None] - 1e-9 * total[..., None]).sum(-1) + 1
    causal = not bool((weights.triu(1) != 0).any())
    keys = torch.arange(1, size + 1, device=weights.device) if causal else k_eff.new_full((size,), size)
    without = torch.where((total > 0) & (keys > 1), 1 - k_eff / keys, torch.nan)
    return without.nanmean(-1)


def measure_windows(
    model: nn.Module, forward: Callable[[Tensor], Any], windows: Tensor, *, n_regions: int
) -> tuple[dict[str, np.ndarray], dict[int | str, str]]:
    """The measures of every head, means over windows.

    Args:
        model: in eval mode; headwise's or a transformers model.
        forward: runs it.
        windows: token ids `(N, W)`.
        n_regions: of the regional form.

    Returns:
        Columns `layer`, `head` and `WINDOW_MEASURES`, and for each layer that was not measured why.

    Raises:
        HeadwiseError: no layer offers weights; says why.
    """
    collector = Windows(measures=tuple(WINDOW_MEASURES), n_regions=n_regions)
    at_once = max(1, AT_ONCE // (USUAL_HEADS * windows.shape[1] ** 2))
    with attached(model, collector), torch.no_grad():
        for some in windows.split(at_once):
            forward(some)
    return collector.columns(), collector.reasons


def draw_windows(tokens: Tensor, window: int, n_windows: int, seed: int) -> Tensor:
    """`n_windows` runs of `window` tokens, each at a random place of a random row of `tokens (B, T)`."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(tokens.shape[0], (n_windows,), generator=draw)
    starts = torch.randint(tokens.shape[1] - window + 1, (n_windows,), generator=draw)
    columns = starts[:, None] + torch.arange(window)
    return tokens[rows[:, None].to(tokens.device), columns.to(tokens.device)]
