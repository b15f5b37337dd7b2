"""Does the entropy of a head tell how important it is? One correlation a run, one test over the runs.

The importance of a head is the loss without it minus the loss with all heads. Heads of one run are
not independent of each other: they read and write one residual stream and were trained together. So
the heads of a run give one number, Pearson's r over (layer, head), and only runs with different
seeds count as independent: Fisher's z of their r is tested against 0 by Student's t over the seeds.
One run has an r and no p-value, however many heads it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headwise.analysis.statistics import paired

MIN_HEADS = 3
_LARGEST_R = 1 - 1e-12  # Fisher's z of 1 is infinite


@dataclass(frozen=True)
class Signal:
    """Correlation of entropy with importance, over the runs of one variant.

    Attributes:
        seeds: seed -> Pearson's r over the heads of that run.
        r: back-transformed mean of Fisher's z; None without a run.
        low, high: its 95% interval over seeds; None for one seed.
        p: two-sided, uncorrected; None for one seed.
    """

    seeds: dict[int, float]
    r: float | None
    low: float | None
    high: float | None
    p: float | None


def head_correlation(
    entropy: Sequence[Sequence[float]], importance: Sequence[Sequence[float]]
) -> float | None:
    """Pearson's r over the heads of one run that have both values.

    Args:
        entropy, importance: a sequence of heads for each layer; a head that is not measured is NaN.

    Returns:
        None where fewer than three heads have both, one of the two does not vary, or the layers and
        heads of the two do not correspond.
    """
    if [len(layer) for layer in entropy] != [len(layer) for layer in importance]:
        return None
    x, y = (
        np.array([v for layer in table for v in layer], dtype=np.float64) for table in (entropy, importance)
    )
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if x.size < MIN_HEADS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = (v / np.abs(v).max() for v in (x - x.mean(), y - y.mean()))
    r = float((x * y).sum() / math.sqrt(float((x * x).sum()) * float((y * y).sum())))
    return max(-1.0, min(1.0, r))


def signal(correlations: Mapping[int, float]) -> Signal:
    """Pool the correlations of runs with different seeds.

    Args:
        correlations: seed -> r.
    """
    z = {seed: math.atanh(max(-_LARGEST_R, min(_LARGEST_R, r))) for seed, r in correlations.items()}
    against_zero = paired(dict.fromkeys(z, 0.0), z)
    found = against_zero.difference

    def back(value: float | None) -> float | None:
        return None if value is None else math.tanh(value)

    return Signal(dict(correlations), back(found.mean), back(found.low), back(found.high), against_zero.p_t)
