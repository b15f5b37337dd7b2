from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import HeadwiseError
from headwise.questions.geometry import correlation

LAYERS, HEADS, WIDTH = 7, 5, 6


def document(seed: int = 0) -> dict[str, Any]:
    """A file as the head geometry note reads it, with entropy that falls with the largest singular value."""
    rng = np.random.default_rng(seed)
    spectra = np.sort(rng.lognormal(size=(LAYERS, HEADS, WIDTH)), axis=-1)[..., ::-1]
    entropy = 3 - 0.3 * spectra[..., 0] + 0.1 * rng.normal(size=(LAYERS, HEADS))
    return correlation.heads_document(
        list(spectra), {"entropy": entropy, "logit_std": rng.normal(size=(LAYERS, HEADS))}
    )


def straight_numbers(data: dict[str, Any]) -> dict[str, Any]:
    """The head geometry note, written again in a straight line: every number that its script prints."""
    entropy = np.array([row["mean_attention_entropy_per_head"] for row in data["dynamic"]])
    logit_std = np.array([row["mean_logit_std_per_head"] for row in data["dynamic"]])
    geometry: dict[str, list[list[float]]] = {}
    for row in data["static"]:
        of_layer: dict[str, list[float]] = {}
        for values in row["metric_singvals_per_head"]:
            s = np.array(values)
            p = np.clip(s**2 / max((s**2).sum(), 1e-12), 1e-12, 1.0)
            numbers = {
                "op_norm": s.max(),
                "fro_norm": np.sqrt((s**2).sum()),
                "trace": s.sum(),
                "rank_eff": s.sum() / max(s.max(), 1e-12),
                "spec_entropy": -(p * np.log(p)).sum(),
                "anisotropy": s.max() / max(s.mean(), 1e-12),
                "condition": s.max() / max(s.min(), 1e-12),
            }
            for name, number in numbers.items():
                of_layer.setdefault(name, []).append(number)
        for name, numbers_of_layer in of_layer.items():
            geometry.setdefault(name, []).append(numbers_of_layer)
    maps = {name: np.array(values) for name, values in geometry.items()}
    pairs = {
        name: (
            np.corrcoef(values.ravel(), entropy.ravel())[0, 1],
            np.corrcoef(values.ravel(), logit_std.ravel())[0, 1],
        )
        for name, values in maps.items()
    }
    n = data["num_layers"]
    thirds = [
        {name: np.corrcoef(v[lo:hi].ravel(), entropy[lo:hi].ravel())[0, 1] for name, v in maps.items()}
        for lo, hi in ((0, n // 3), (n // 3, 2 * n // 3), (2 * n // 3, n))
    ]
    x = np.stack([maps[k].ravel() for k in ("op_norm", "spec_entropy", "rank_eff", "anisotropy")], axis=1)
    x = (x - x.mean(0)) / (x.std(0) + 1e-12)
    y = (entropy.ravel() - entropy.mean()) / (entropy.std() + 1e-12)
    ones = np.concatenate([x, np.ones((x.shape[0], 1))], axis=1)
    coefficients = np.linalg.lstsq(ones, y, rcond=None)[0]
    r2 = 1 - ((y - ones @ coefficients) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return {"pairs": pairs, "thirds": thirds, "r2": r2, "coefficients": coefficients[:-1]}


def read(data: Any) -> correlation.Heads:
    """`data` as it comes back from a file."""
    return correlation.parse_heads(json.loads(json.dumps(data)), "heads.json")


@pytest.mark.parametrize("seed", range(5))
def test_numbers_are_those_of_the_head_geometry_note(seed: int) -> None:
    data = document(seed)
    report = correlation.correlate(read(data), draws=50)
    straight = straight_numbers(data)
    for name, (with_entropy, with_logit_std) in straight["pairs"].items():
        assert report.pairs[name]["entropy"].r == pytest.approx(with_entropy, abs=1e-12)
        assert report.pairs[name]["logit_std"].r == pytest.approx(with_logit_std, abs=1e-12)
    for third, expected in zip(report.thirds, straight["thirds"], strict=True):
        assert third.r == pytest.approx(expected, abs=1e-12)
    assert [(t.name, t.first, t.last) for t in report.thirds] == [
        ("early", 0, 1),
        ("mid", 2, 3),
        ("late", 4, 6),
    ]
    assert report.best == max(straight["pairs"], key=lambda name: abs(straight["pairs"][name][0]))
    assert report.regression.r2 == pytest.approx(straight["r2"], abs=1e-12)
    assert list(report.regression.coefficients.values()) == pytest.approx(
        list(straight["coefficients"]), abs=1e-9
    )


def test_intervals_p_values_and_holm_agree_with_scipy() -> None:
    from scipy import stats

    heads = read(document(3))
    report = correlation.correlate(heads)
    raw = []
    for name, row in report.pairs.items():
        for dynamic, found in row.items():
            x, y = heads.geometry[name].ravel(), heads.dynamics[dynamic].ravel()
            expected = stats.pearsonr(x, y)
            interval = expected.confidence_interval(0.95)
            assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
            assert found.fisher == pytest.approx((interval.low, interval.high), abs=1e-9)
            assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
            assert found.bootstrap[0] <= found.r <= found.bootstrap[1]
            raw.append((found.p, found.p_holm))
    assert min(corrected for _, corrected in raw) == pytest.approx(min(1, min(p for p, _ in raw) * len(raw)))
    assert all(corrected >= p for p, corrected in raw)


def test_bootstrap_resamples_layers_not_heads() -> None:
    """Two layers that differ, heads within a layer alike: heads alone would claim near certainty."""
    rng = np.random.default_rng(0)
    level = np.repeat(np.arange(4.0)[:, None], 50, axis=1)
    x, y = (
        level + 0.01 * rng.normal(size=level.shape),
        level[[1, 0, 3, 2]] + 0.01 * rng.normal(size=level.shape),
    )
    report = correlation.correlate(correlation.Heads({"entropy": y}, {"op_norm": x, **others(level.shape)}))
    found = report.pairs["op_norm"]["entropy"]
    assert np.diff(found.bootstrap) > 3 * np.diff(found.fisher)


def test_bootstrap_equals_resampling_by_hand() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 6, 3))
    heads = correlation.Heads({"entropy": y}, {"op_norm": x, **others(x.shape)})
    found = correlation.correlate(heads, draws=300, seed=5).pairs["op_norm"]["entropy"].bootstrap
    counts = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=300)
    r = [np.corrcoef(np.repeat(x, c, axis=0).ravel(), np.repeat(y, c, axis=0).ravel())[0, 1] for c in counts]
    assert found == pytest.approx(tuple(np.quantile(r, [0.025, 0.975])), abs=1e-9)


def others(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(9)
    return {name: rng.normal(size=shape) for name in ("spec_entropy", "rank_eff", "anisotropy")}


@settings(max_examples=50, deadline=None)
@given(st.floats(-1, 1), st.integers(4, 2000))
def test_fisher_interval_holds_r_and_stays_in_range(r: float, n: int) -> None:
    low, high = correlation.fisher_interval(r, n)
    assert -1 <= low <= r + 1e-12
    assert r - 1e-12 <= high <= 1


def test_degenerate_heads_do_not_break_it() -> None:
    data = document()
    data["static"][0]["metric_singvals_per_head"][0] = [0.0] * WIDTH
    data["static"][1]["metric_singvals_per_head"][1] = [2.0] * WIDTH
    data["dynamic"][2]["mean_attention_entropy_per_head"][2] = None
    report = correlation.correlate(read(data), draws=50)
    assert report.left_out == 1
    assert np.isfinite(report.regression.r2)
    assert all(np.isfinite(c.r) for row in report.pairs.values() for c in row.values())


def test_a_model_whose_heads_are_all_equal_has_no_correlation() -> None:
    data = document()
    for row in data["static"]:
        row["metric_singvals_per_head"] = [[0.3] * WIDTH] * HEADS
    report = correlation.correlate(read(data), draws=50)
    assert report.best is None
    assert all(
        np.isnan(row["entropy"].r) and np.isnan(row["entropy"].p_holm) for row in report.pairs.values()
    )
    assert report.regression.r2 == pytest.approx(0, abs=1e-9)


def test_one_layer_has_no_bootstrap_and_no_early_third() -> None:
    data = document()
    data = data | {"num_layers": 1, "static": data["static"][:1], "dynamic": data["dynamic"][:1]}
    report = correlation.correlate(read(data))
    assert np.isnan(report.pairs["op_norm"]["entropy"].bootstrap).all()
    assert np.isnan(report.thirds[0].r["op_norm"])
    assert np.isfinite(report.thirds[2].r["op_norm"])


def broken(change: Any) -> Any:
    data = document()
    change(data)
    return data


BROKEN = {
    "not an object": ([1], "holds a JSON list"),
    "no layers": (broken(lambda d: d.pop("num_layers")), "num_layers is None"),
    "no dynamic": (broken(lambda d: d.pop("dynamic")), "dynamic is missing.*--profile"),
    "rows": (broken(lambda d: d["static"].pop()), "static holds 6 rows; expected num_layers = 7"),
    "heads": (
        broken(lambda d: d["dynamic"][3]["mean_logit_std_per_head"].pop()),
        r"dynamic\[3\].mean_logit_std_per_head holds 4 values; expected num_heads = 5",
    ),
    "text": (
        broken(lambda d: d["static"][2]["metric_singvals_per_head"][1].__setitem__(0, "high")),
        r"static\[2\].metric_singvals_per_head\[1\] holds 'high'",
    ),
    "empty": (
        broken(lambda d: d["static"][2]["metric_singvals_per_head"][1].clear()),
        r"static\[2\].metric_singvals_per_head\[1\] holds 0 values",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_in_one_line(case: str) -> None:
    data, message = BROKEN[case]
    with pytest.raises(HeadwiseError, match=message) as caught:
        read(data)
    assert "\n" not in str(caught.value)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.floats(-30, 30))
def test_no_correlation_depends_on_units(seed: int, weights: float, measures: float) -> None:
    rng = np.random.default_rng(seed)
    spectra, entropy = rng.lognormal(size=(LAYERS, HEADS, WIDTH)), rng.normal(size=(LAYERS, HEADS))
    dynamics = {"entropy": entropy, "logit_std": rng.normal(size=(LAYERS, HEADS))}
    scaled = {name: values * 10.0**measures for name, values in dynamics.items()}
    one, other = (
        correlation.correlate(
            correlation.parse_heads(correlation.heads_document(list(s), found), "x"), draws=50
        )
        for s, found in ((spectra, dynamics), (spectra * 10.0**weights, scaled))
    )
    for name, row in one.pairs.items():
        for dynamic, found in row.items():
            again = other.pairs[name][dynamic]
            np.testing.assert_allclose((again.r, *again.bootstrap), (found.r, *found.bootstrap), atol=1e-6)
    assert other.regression.r2 == pytest.approx(one.regression.r2, abs=1e-6)
    assert list(other.regression.coefficients.values()) == pytest.approx(
        list(one.regression.coefficients.values()), abs=1e-5
    )


def test_a_regression_on_what_only_rounding_varies_is_not_made() -> None:
    data = document()
    for row in data["dynamic"]:
        row["mean_attention_entropy_per_head"] = [0.1 + 0.2 if i % 2 else 0.3 for i in range(HEADS)]
    report = correlation.correlate(correlation.parse_heads(data, "x"), draws=20)
    assert np.isnan(report.regression.r2)
    assert np.isnan(report.pairs["op_norm"]["entropy"].r)
