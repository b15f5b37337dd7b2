from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headwise.questions.geometry import numbers as geometry

sizes = st.tuples(
    st.integers(1, 3),  # key/value heads
    st.integers(1, 3),  # query heads for each
    st.integers(1, 12),  # head_dim
    st.integers(1, 40),  # d_model, smaller than head_dim too
    st.integers(0, 2**32 - 1),
)


def weights(
    kv_heads: int, group: int, head_dim: int, d_model: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(kv_heads * group, head_dim, d_model)) * rng.lognormal(
        size=(kv_heads * group, 1, 1)
    )
    return own, rng.normal(size=(kv_heads, head_dim, d_model))


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_query_key_circuit_equals_the_large_svd(size: tuple[int, int, int, int, int]) -> None:
    w_q, w_k = weights(*size)
    got = geometry.query_key_singular_values(w_q, w_k)
    group = size[1]
    for head, values in enumerate(got):
        large = np.linalg.svd(w_k[head // group].T @ w_q[head], compute_uv=False)
        np.testing.assert_allclose(values, large[: values.size], rtol=1e-9, atol=1e-9 * large[0])
        assert large[values.size :].max(initial=0) <= 1e-9 * large[0]
        product = np.linalg.svd(w_k[head // group] @ w_q[head].T, compute_uv=False)
        core = geometry.query_key_singular_values(w_q, w_k, matrix="core")[head]
        np.testing.assert_allclose(core, product, rtol=1e-9, atol=1e-9 * product[0])


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_value_output_circuit_equals_the_large_svd(size: tuple[int, int, int, int, int]) -> None:
    out, w_v = weights(*size)
    w_o = out.swapaxes(1, 2)
    got = geometry.value_output_singular_values(w_v, w_o)
    for head, values in enumerate(got):
        large = np.linalg.svd(w_o[head] @ w_v[head // size[1]], compute_uv=False)
        np.testing.assert_allclose(values, large[: values.size], rtol=1e-9, atol=1e-9 * large[0])


spectra = st.lists(st.one_of(st.just(0.0), st.floats(1e-20, 1e6)), min_size=1, max_size=64).filter(any)


@settings(max_examples=80, deadline=None)
@given(spectra)
@example([5.96e-8])
@example([5.96e-8, 0.0])
@example([1e-13, 5e-14])
def test_descriptor_laws(values: list[float]) -> None:
    s = np.array(values)
    d = geometry.descriptors(s)
    assert all(np.isfinite(v) for v in d.values())
    assert -1e-9 <= d["spec_entropy"] <= np.log(s.size) + 1e-9
    assert 1 - 1e-9 <= d["rank_eff"] <= s.size + 1e-9
    np.testing.assert_allclose(d["anisotropy"] * d["rank_eff"], s.size, rtol=1e-9)
    assert d["op_norm"] <= d["fro_norm"] * (1 + 1e-12)
    assert d["fro_norm"] <= d["trace"] * (1 + 1e-12)
    assert 1 <= d["condition"] <= 1e12 * (1 + 1e-12)
    if s.min() > 1e-11 * s.max():
        np.testing.assert_allclose(d["condition"], s.max() / s.min(), rtol=1e-12)
    if np.count_nonzero(s) == 1:
        np.testing.assert_allclose(d["spec_entropy"], 0, atol=1e-8)


@settings(max_examples=80, deadline=None)
@given(spectra, st.floats(-30, 30), st.integers(-90, 90))
def test_the_weights_size_changes_only_norms(values: list[float], decades: float, octaves: int) -> None:
    s = np.array(values)
    d = geometry.descriptors(s)
    scaled, by_halves = geometry.descriptors(s * 10.0**decades), geometry.descriptors(s * 2.0**octaves)
    for name in ("op_norm", "fro_norm", "trace"):
        np.testing.assert_allclose(scaled[name], 10.0**decades * d[name], rtol=1e-9)
    for name in ("rank_eff", "spec_entropy", "anisotropy", "condition"):
        np.testing.assert_allclose(scaled[name], d[name], rtol=1e-9, atol=1e-9)
        assert by_halves[name] == d[name], name  # a power of two rounds nothing


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("matrix", geometry.MATRICES)
def test_small_weights_of_any_precision_are_described_like_large_ones(dtype: type, matrix: str) -> None:
    small = [(w * 2.0**-10).astype(dtype) for w in weights(2, 2, 4, 10, 3)]
    large = [w.astype(np.float64) * 2.0**20 for w in small]
    expected = geometry.descriptors(geometry.query_key_singular_values(*large, matrix))
    found = geometry.descriptors(geometry.query_key_singular_values(*small, matrix))
    for name in ("rank_eff", "spec_entropy", "anisotropy", "condition"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, err_msg=name)


def test_degenerate_heads() -> None:
    several = np.array([[0.0] * 4, [2.0] * 4, [3.0, 0, 0, 0]])
    d = geometry.descriptors(several)
    assert all(np.isfinite(v).all() for v in d.values())
    for name, values in d.items():
        assert values[0] == 0, name
    np.testing.assert_allclose(d["rank_eff"], [0, 4, 1])
    np.testing.assert_allclose(d["spec_entropy"], [0, np.log(4), 0], atol=1e-9)
    np.testing.assert_allclose(d["condition"], [0, 1, 1e12])


def test_a_head_of_low_rank_keeps_the_others_exact() -> None:
    w_q, w_k = weights(1, 3, 4, 10, 0)
    w_q[1] = 0
    w_q[2, 1:] = w_q[2, 0]
    got = geometry.query_key_singular_values(w_q, w_k)
    assert got[1].max() == 0
    assert (got[2][1:] < 1e-12 * got[2][0]).all()
    np.testing.assert_allclose(got[0], geometry.query_key_singular_values(w_q[:1], w_k)[0])


def test_a_weight_that_is_not_finite_gives_nan_for_its_head_alone() -> None:
    w_q, w_k = weights(2, 1, 4, 10, 1)
    w_q[1, 2, 3] = np.inf
    got = geometry.query_key_singular_values(w_q, w_k)
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1]).all()
    assert np.isnan(geometry.descriptors(got)["op_norm"][1])


def test_shapes_that_do_not_belong_together_are_quoted() -> None:
    with pytest.raises(ValueError, match="operands"):
        geometry.query_key_singular_values(np.zeros((2, 4, 9)), np.zeros((2, 4, 10)))
    with pytest.raises(ValueError, match="3 heads cannot share 2"):
        geometry.query_key_singular_values(np.zeros((3, 4, 9)), np.zeros((2, 4, 9)))
    with pytest.raises(ValueError, match="'cor'"):
        geometry.query_key_singular_values(np.zeros((2, 4, 9)), np.zeros((2, 4, 9)), matrix="cor")
