"""A budget for each layer, chosen greedily: lower the layer that misses its keys least, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

ENOUGH = 1e-9


def greedy_shares(
    n_layers: int, targets: Sequence[float], least: float, loss: Callable[[list[float]], float]
) -> dict[float, list[float]]:
    """Shares of the context for each layer whose mean is each of `targets`.

    All layers begin with everything. A step halves the share of one layer, or lowers it by what is
    still too much: of the layer whose loss rises least for each share that it gives up.

    Args:
        targets: mean shares, in (0, 1].
        least: no layer gets a smaller share, unless it has to for a mean below it.
        loss: of the model with these shares of its layers.

    Returns:
        target -> share of each layer.
    """
    current, now = [1.0] * n_layers, loss([1.0] * n_layers)
    found = {}
    for target in sorted(set(targets), reverse=True):
        floor = min(least, target)
        while (excess := sum(current) - target * n_layers) > ENOUGH:
            tried = []
            for layer, share in enumerate(current):
                lower = max(share / 2, share - excess, floor)
                if share - lower > ENOUGH:
                    shares = [*current[:layer], lower, *current[layer + 1 :]]
                    after = loss(shares)
                    tried.append(((after - now) / (share - lower), after, shares))
            _, now, current = min(tried, key=lambda step: step[0])
        found[target] = list(current)
    return found
