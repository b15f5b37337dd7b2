"""Does a head's geometry predict how it attends? Correlation of descriptors with dynamics, over heads.

The tables are the head geometry note's: Pearson r of every descriptor with mean entropy and mean logit std
over all (layer, head), the same within thirds of the layers, the best single predictor, a standardised
regression. Beyond them: 95% intervals by Fisher's z (as if heads were independent) and by resampling
whole layers (heads of a layer are not independent), Spearman's rho, p-values with Holm's correction,
and the regression's condition number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwise.analysis.statistics import holm
from headwise.errors import HeadwiseError
from headwise.questions.geometry.numbers import DESCRIPTORS, descriptors

Array = NDArray[np.float64]
Interval = tuple[float, float]

DYNAMICS = {
    "entropy": "mean_attention_entropy_per_head",
    "logit_std": "mean_logit_std_per_head",
}
SINGULAR_VALUES = "metric_singvals_per_head"

REGRESSORS = ("op_norm", "spec_entropy", "rank_eff", "anisotropy")
BOOTSTRAP_DRAWS = 2000
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Heads:
    """The head geometry note's file: dynamics and descriptors by name, each `(L, H)`; NaN = unknown."""

    dynamics: dict[str, Array]
    geometry: dict[str, Array]

    @property
    def shape(self) -> tuple[int, int]:
        """`(L, H)`."""
        layers, heads = self.dynamics["entropy"].shape
        return layers, heads


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of `n` heads with its intervals, Spearman's rho, and the two-sided p of r."""

    n: int
    r: float
    fisher: Interval
    bootstrap: Interval
    rho: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class Third:
    """Pearson r with entropy of each descriptor, within layers `first` to `last` (inclusive)."""

    name: str
    first: int
    last: int
    r: dict[str, float]


@dataclass(frozen=True)
class Regression:
    """Entropy on standardised descriptors: R², coefficients, and the design's condition number."""

    r2: float
    coefficients: dict[str, float]
    condition: float


@dataclass(frozen=True)
class Report:
    """Everything `correlate` finds; `pairs[descriptor][dynamic]`."""

    shape: tuple[int, int]
    left_out: int
    pairs: dict[str, dict[str, Correlation]]
    thirds: list[Third]
    best: str | None
    regression: Regression


def correlate(heads: Heads, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> Report:
    """Correlate every descriptor with every dynamic measure over all (layer, head).

    Heads with an unknown value are left out throughout, and counted.

    Args:
        draws: bootstrap samples of layers.
        seed: of the bootstrap.
    """
    columns = [*heads.dynamics.values(), *heads.geometry.values()]
    known = np.asarray(np.isfinite(np.stack(columns)).all(0))
    drawn = np.random.default_rng(seed).multinomial(known.shape[0], _uniform(known.shape[0]), size=draws)
    pairs = {
        name: {
            dynamic: _correlation(values, measured, known, drawn)
            for dynamic, measured in heads.dynamics.items()
        }
        for name, values in heads.geometry.items()
    }
    defined = [name for name in pairs if np.isfinite(pairs[name]["entropy"].r)]
    return Report(
        shape=heads.shape,
        left_out=int((~known).sum()),
        pairs=_with_holm(pairs),
        thirds=_thirds(heads, known),
        best=max(defined, key=lambda name: abs(pairs[name]["entropy"].r), default=None),
        regression=_regression(heads, known),
    )


def pearson(x: Array, y: Array) -> float:
    """Pearson's r; NaN where it is not defined: fewer than two values, or one that only rounding varies."""
    if x.size < 2 or _constant(x) or _constant(y):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def fisher_interval(r: float, n: int) -> Interval:
    """95% interval of Pearson's r by Fisher's z; NaN for n <= 3."""
    if n <= 3 or not np.isfinite(r):
        return float("nan"), float("nan")
    if abs(r) >= 1:
        return r, r
    z, half = np.arctanh(r), Z_95 / np.sqrt(n - 3)
    return float(np.tanh(z - half)), float(np.tanh(z + half))


def parse_heads(content: object, path: str) -> Heads:
    """The content of the head geometry note's JSON file; `path` names it in errors.

    Raises:
        HeadwiseError: it is not such a file; the line names the first field that is missing or wrong.
    """
    if not isinstance(content, dict):
        raise HeadwiseError(f"{path} holds a JSON {type(content).__name__}, not an object with num_layers")
    layers, heads = (_count(content, name, path) for name in ("num_layers", "num_heads"))
    dynamic = _rows(content, "dynamic", layers, path)
    static = _rows(content, "static", layers, path)
    dynamics = {
        name: np.array(
            [_numbers(row, field, heads, f"{path}: dynamic[{i}]") for i, row in enumerate(dynamic)]
        )
        for name, field in DYNAMICS.items()
    }
    geometry = {name: np.full((layers, heads), np.nan) for name in DESCRIPTORS}
    for layer, row in enumerate(static):
        for head, values in enumerate(_spectra(row, heads, f"{path}: static[{layer}]")):
            for name, value in descriptors(values).items():
                geometry[name][layer, head] = value
    return Heads(dynamics, geometry)


def heads_document(singular_values: list[Array], dynamics: dict[str, Array] | None = None) -> dict[str, Any]:
    """The content of the head geometry note's JSON file.

    Args:
        singular_values: per layer `(H, D)`.
        dynamics: `entropy` and `logit_std`, each `(L, H)`; None leaves `dynamic` out.
    """
    document: dict[str, Any] = {
        "num_layers": len(singular_values),
        "num_heads": int(singular_values[0].shape[0]),
        "static": [{SINGULAR_VALUES: values.tolist()} for values in singular_values],
    }
    if dynamics is not None:
        document["dynamic"] = [
            {field: dynamics[name][layer].tolist() for name, field in DYNAMICS.items()}
            for layer in range(len(singular_values))
        ]
    return document


def _correlation(
    values: Array, measured: Array, known: NDArray[np.bool_], drawn: NDArray[np.int64]
) -> Correlation:
    from scipy.stats import rankdata

    x, y = values[known], measured[known]
    r, n = pearson(x, y), x.size
    rho = pearson(rankdata(x), rankdata(y)) if n else float("nan")
    bootstrap = _bootstrap_interval(values, measured, known, drawn) if np.isfinite(r) else (np.nan, np.nan)
    return Correlation(n, r, fisher_interval(r, n), bootstrap, rho, _p_value(r, n), float("nan"))


def _bootstrap_interval(
    values: Array, measured: Array, known: NDArray[np.bool_], drawn: NDArray[np.int64]
) -> Interval:
    """Percentile interval of r over resampled layers; `drawn (draws, L)` counts how often each came."""
    layers = known.shape[0]
    if layers < 2:
        return float("nan"), float("nan")
    x = _near_one(np.where(known, values - values[known].mean(), 0.0))
    y = _near_one(np.where(known, measured - measured[known].mean(), 0.0))
    moments = np.stack([known, x, y, x * x, y * y, x * y]).sum(-1)  # (6, L)
    n, sx, sy, sxx, syy, sxy = np.moveaxis(drawn @ moments.T, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (sxx - sx * sx / n) * (syy - sy * sy / n)
        r = (sxy - sx * sy / n) / np.sqrt(spread)
    r = r[np.isfinite(r)]
    if not r.size:
        return float("nan"), float("nan")
    low, high = np.clip(np.quantile(r, [0.025, 0.975]), -1, 1)
    return float(low), float(high)


def _p_value(r: float, n: int) -> float:
    from scipy.special import stdtr

    if n < 3 or not np.isfinite(r):
        return float("nan")
    if abs(r) >= 1:
        return 0.0
    return float(2 * stdtr(n - 2, -abs(r) * np.sqrt((n - 2) / (1 - r * r))))


def _with_holm(pairs: dict[str, dict[str, Correlation]]) -> dict[str, dict[str, Correlation]]:
    """Fill in p_holm, over all pairs of a descriptor and a dynamic measure."""
    from dataclasses import replace

    keys = [(name, dynamic) for name in pairs for dynamic in pairs[name]]
    raw = [pairs[name][dynamic].p for name, dynamic in keys]
    corrected = holm([p if np.isfinite(p) else None for p in raw])
    table = {key: float("nan") if p is None else p for key, p in zip(keys, corrected, strict=True)}
    return {
        name: {dynamic: replace(c, p_holm=table[name, dynamic]) for dynamic, c in row.items()}
        for name, row in pairs.items()
    }


def _thirds(heads: Heads, known: NDArray[np.bool_]) -> list[Third]:
    layers = known.shape[0]
    bounds = [0, layers // 3, 2 * layers // 3, layers]
    thirds = []
    for name, low, high in zip(("early", "mid", "late"), bounds, bounds[1:], strict=False):
        inside = known[low:high]
        entropy = heads.dynamics["entropy"][low:high][inside]
        r = {key: pearson(values[low:high][inside], entropy) for key, values in heads.geometry.items()}
        thirds.append(Third(name, low, high - 1, r))
    return thirds


def _regression(heads: Heads, known: NDArray[np.bool_]) -> Regression:
    """The head geometry note's: least squares of standardised entropy, population standard deviations."""
    design = np.stack([_standardised(heads.geometry[name][known]) for name in REGRESSORS], axis=1)
    target = _standardised(heads.dynamics["entropy"][known])
    if not target.size or not target.any():
        return Regression(float("nan"), dict.fromkeys(REGRESSORS, float("nan")), float("nan"))
    with_intercept = np.concatenate([design, np.ones((design.shape[0], 1))], axis=1)
    coefficients = np.linalg.lstsq(with_intercept, target, rcond=None)[0]
    residual = target - with_intercept @ coefficients
    r2 = 1 - float((residual**2).sum() / ((target - target.mean()) ** 2).sum())
    named = {name: float(c) for name, c in zip(REGRESSORS, coefficients, strict=False)}
    return Regression(r2, named, float(np.linalg.cond(design)))


def _standardised(values: Array) -> Array:
    """Mean 0 and population standard deviation 1; zeros where only rounding varies."""
    if not values.size or _constant(values):
        return np.zeros_like(values)
    values = _near_one(values)
    return (values - values.mean()) / values.std()


def _near_one(values: Array) -> Array:
    """The values over a power of two near the largest: exact, and squares neither vanish nor overflow."""
    return np.asarray(np.ldexp(values, -np.frexp(np.abs(values).max())[1]))


def _constant(values: Array) -> bool:
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def _uniform(n: int) -> Array:
    return np.full(n, 1 / n)


def _count(content: dict[str, Any], name: str, path: str) -> int:
    value = content.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise HeadwiseError(f"{path}: {name} is {value!r}; expected a whole number of at least 1")
    return value


def _rows(content: dict[str, Any], name: str, layers: int, path: str) -> list[dict[str, Any]]:
    rows = content.get(name)
    if rows is None:
        hint = "; give --profile DIR when making the file" if name == "dynamic" else ""
        raise HeadwiseError(f"{path}: {name} is missing{hint}")
    if not isinstance(rows, list) or len(rows) != layers or not all(isinstance(row, dict) for row in rows):
        found = f"{len(rows)} rows" if isinstance(rows, list) else f"a {type(rows).__name__}"
        raise HeadwiseError(f"{path}: {name} holds {found}; expected num_layers = {layers} objects")
    return rows


def _numbers(row: dict[str, Any], field: str, length: int | None, where: str) -> Array:
    """A list of numbers; null becomes NaN."""
    values = row.get(field)
    if not isinstance(values, list) or not values or (length is not None and len(values) != length):
        found = f"{len(values)} values" if isinstance(values, list) else repr(values)
        wanted = "at least one number" if length is None else f"num_heads = {length} numbers"
        raise HeadwiseError(f"{where}.{field} holds {found}; expected {wanted}")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise HeadwiseError(f"{where}.{field} holds {value!r}, which is not a number")
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _spectra(row: dict[str, Any], heads: int, where: str) -> list[Array]:
    spectra = row.get(SINGULAR_VALUES)
    if not isinstance(spectra, list) or len(spectra) != heads:
        found = f"{len(spectra)} heads" if isinstance(spectra, list) else repr(spectra)
        raise HeadwiseError(f"{where}.{SINGULAR_VALUES} holds {found}; expected num_heads = {heads} lists")
    return [
        _numbers({f"{SINGULAR_VALUES}[{h}]": values}, f"{SINGULAR_VALUES}[{h}]", None, where)
        for h, values in enumerate(spectra)
    ]
