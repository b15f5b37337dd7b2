"""How strongly a head answers to the length of its query: gains, their ratio, and what it may mean.

    gain = slope of mean max_weight against ln(scale), ordinary least squares        (query-scaling study)

Two uncertainties are kept apart. The slope's standard error over the scales says how far from a
straight line the response is; it does not shrink with more text. The spread of gains over samples
says what another draw of text would give. A ratio's interval is Fieller's, and its reading is drawn
from the samples where they are known, from the scales otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headwise.analysis.statistics import t_quantile
from headwise.questions.intervene.sweep import MEASURES, Cell, Sweep, monotonic

Array = NDArray[np.float64]

FLAT_SHARE = 0.05
HIGHER, STRONG = 1.5, 2.0

FAILURE_RULE = (
    "If the target head does not exhibit monotonic trends while the control head remains flat, "
    "the Phase-0 correlation is likely epiphenomenal."
)
MATHEMATICS = (
    "Without bias or soft-capping, scaling q by β only sharpens a softmax: dH/dβ = -β·Var_p(s) <= 0. "
    "Monotonic trends are forced for every head and prove nothing. What separates heads is the size of "
    "the gain against the distribution over control heads, and the effect on the loss."
)


@dataclass(frozen=True)
class Fit:
    """Least squares of values against ln(scale), for one or many series at once."""

    slope: Array
    intercept: Array
    std_error: Array
    r_squared: Array
    n: int

    @property
    def half_width(self) -> Array:
        """Half of the slope's 95% interval, Student's t with n - 2 degrees of freedom."""
        return self.std_error * (t_quantile(self.n - 1) if self.n > 2 else math.nan)


@dataclass(frozen=True)
class Gain:
    """The gain of one head; `low`, `high` its 95% interval over scales."""

    layer: int
    head: int
    head_type: str
    gain: float
    intercept: float
    std_error: float
    low: float
    high: float
    r_squared: float
    gain_entropy: float
    gain_k_eff: float
    monotonic: bool
    n_scales: int
    per_sample: Array | None = None
    samples_of: str = ""

    @property
    def name(self) -> str:
        """`L12 H0`."""
        return f"L{self.layer} H{self.head}"


@dataclass(frozen=True)
class Ratio:
    """gain(target) / gain(control), a 95% interval, and where the interval comes from."""

    value: float
    low: float
    high: float
    over: str


def fit(scales: Array | Sequence[float], values: Array) -> Fit:
    """Regress `values (S, ...)` on ln(scale).

    Raises:
        ValueError: fewer than two different scales, or one that is not positive.
    """
    scales, values = np.asarray(scales, np.float64), np.asarray(values, np.float64)
    if (scales <= 0).any() or np.unique(scales).size < 2:
        raise ValueError(f"a gain needs two different scales above 0, got {scales.tolist()}")
    x = np.log(scales) - np.log(scales).mean()
    mean = values.mean(0)
    slope = np.tensordot(x, values, axes=(0, 0)) / (x @ x)
    residual = values - mean - np.multiply.outer(x, slope)
    left, total = (residual**2).sum(0), ((values - mean) ** 2).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        std_error = np.sqrt(left / (x.size - 2) / (x @ x)) if x.size > 2 else np.full_like(slope, np.nan)
        r_squared = np.where(total > 0, 1 - left / total, np.nan)
    return Fit(slope, mean - slope * np.log(scales).mean(), std_error, r_squared, x.size)


def gain_of(sweep: Sweep) -> Gain:
    """The gain of a sweep, with the slopes of entropy and k_eff beside it."""
    by = {name: fit(sweep.scales, sweep.mean[name]) for name in MEASURES}
    main, trends = by["max_weight"], monotonic(sweep)
    return Gain(
        layer=sweep.layer,
        head=sweep.head,
        head_type=sweep.head_type,
        gain=float(main.slope),
        intercept=float(main.intercept),
        std_error=float(main.std_error),
        low=float(main.slope - main.half_width),
        high=float(main.slope + main.half_width),
        r_squared=float(main.r_squared),
        gain_entropy=float(by["entropy"].slope),
        gain_k_eff=float(by["k_eff"].slope),
        monotonic=bool(trends) and all(trends.values()),
        n_scales=main.n,
        per_sample=None if sweep.samples is None else fit(sweep.scales, sweep.samples).slope,
        samples_of=sweep.samples_of,
    )


def flat(gain: Gain, median: float) -> bool:
    """Whether the gain's interval contains 0, or it is below 5% of the median head's."""
    return gain.low <= 0 <= gain.high or gain.gain < FLAT_SHARE * median


def gain_ratio(target: Gain, control: Gain) -> Ratio:
    """Target over control, from the samples that both measured, or else from the fits."""
    a, b = target.per_sample, control.per_sample
    if a is not None and b is not None and a.size == b.size > 1 and target.samples_of == control.samples_of:
        n = a.size
        covariance = np.cov(a, b) / n
        interval = fieller(float(a.mean()), float(b.mean()), covariance, t_quantile(n))
        return Ratio(_divide(a.mean(), b.mean()), *interval, over=f"{n} samples")
    covariance = np.diag([target.std_error**2, control.std_error**2])
    degrees = min(target.n_scales, control.n_scales) - 2  # of the worse fit: never too bold
    t = t_quantile(degrees + 1) if degrees > 0 else math.nan
    interval = fieller(target.gain, control.gain, covariance, t)
    return Ratio(_divide(target.gain, control.gain), *interval, over="scales")


def fieller(a: float, b: float, covariance: Array, t: float) -> tuple[float, float]:
    """Interval of a/b by Fieller's theorem; (-inf, inf) where b is not distinguishable from 0.

    Args:
        covariance: `(2, 2)`, of the estimates a and b.
        t: Student quantile.
    """
    (va, cov), (_, vb) = np.asarray(covariance, np.float64)
    if not np.isfinite([a, b, va, vb, cov, t]).all():
        return math.nan, math.nan
    # all ratios r with (a - r·b)² <= t²·Var(a - r·b)
    square, cross, rest = b * b - t * t * vb, a * b - t * t * cov, a * a - t * t * va
    if square <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(cross * cross - square * rest, 0.0))
    return (cross - root) / square, (cross + root) / square


def reading(ratio: Ratio) -> str:
    """What the ratio means, drawn from its interval; INCONCLUSIVE where it spans a threshold."""
    if not np.isfinite([ratio.value, ratio.low, ratio.high]).all():
        return "INCONCLUSIVE: the control's gain cannot be told from 0, so the ratio has no bounds"
    if ratio.low >= STRONG:
        return "strong evidence of head-specific exploitation (the whole interval is at least 2.0)"
    if ratio.low >= HIGHER:
        return "the target is more sensitive (the whole interval is at least 1.5)"
    if ratio.high < 1:
        return "the target is less sensitive than the control (the whole interval is below 1.0)"
    if ratio.high < HIGHER:
        near = "contains" if ratio.low <= 1 else "lies between 1.0 and 1.5, not far from"
        return f"no functional distinction, a universal mechanism (the interval {near} 1.0, below 1.5)"
    return "INCONCLUSIVE: the interval spans 1.5"


def rule_applied(target: Gain, control: Gain, median: float) -> str:
    """The query-scaling study's failure rule on this pair, in one sentence."""
    trends = "monotonic" if target.monotonic else "not monotonic"
    if not flat(control, median):
        return (
            f"The target's trends are {trends}; the control is not flat either (gain {control.gain:.4f}), so "
            "the rule decides nothing: the gain ratio does."
        )
    if target.monotonic:
        return "The target's trends are monotonic and the control is flat: the rule finds no failure."
    return "The target's trends are not monotonic while the control is flat: by the rule, epiphenomenal."


def summary_row(gain: Gain) -> dict[str, Cell | bool]:
    """One row of `gain_summary.csv`."""
    return {
        "layer": gain.layer,
        "head": gain.head,
        "head_type": gain.head_type,
        "gain_max_attn": gain.gain,
        "r_squared": gain.r_squared,
        "std_error": gain.std_error,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "gain_entropy": gain.gain_entropy,
        "gain_k_eff": gain.gain_k_eff,
        "is_monotonic": gain.monotonic,
    }


def _divide(a: float, b: float) -> float:
    return float(a / b) if b else math.nan
