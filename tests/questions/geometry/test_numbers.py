from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=64), st.floats(1e-3, 1e3))
def test_descriptor_laws(values: list[float], factor: float) -> None:
    s = np.array(values)
    d = geometry.descriptors(s)
    assert all(np.isfinite(v) for v in d.values())
    assert d["spec_entropy"] <= np.log(s.size) + 1e-9
    if s.max() > 1e-3:
        assert 1 - 1e-9 <= d["rank_eff"] <= s.size + 1e-9
        np.testing.assert_allclose(d["anisotropy"] * d["rank_eff"], s.size, rtol=1e-9)
        assert d["op_norm"] <= d["fro_norm"] * (1 + 1e-12)
        assert d["fro_norm"] <= d["trace"] * (1 + 1e-12)
        scaled = geometry.descriptors(s * factor)
        for name in ("op_norm", "fro_norm", "trace"):
            np.testing.assert_allclose(scaled[name], factor * d[name], rtol=1e-9)
        for name in ("rank_eff", "anisotropy"):
            np.testing.assert_allclose(scaled[name], d[name], rtol=1e-9)


def test_degenerate_heads() -> None:
    spectra = np.array([[0.0] * 4, [2.0] * 4, [3.0, 0, 0, 0]])
    d = geometry.descriptors(spectra)
    assert all(np.isfinite(v).all() for v in d.values())
    for name, values in d.items():
        assert abs(values[0]) < 1e-9, name
    np.testing.assert_allclose(d["rank_eff"], [0, 4, 1])
    np.testing.assert_allclose(d["spec_entropy"], [0, np.log(4), 0], atol=1e-9)
    np.testing.assert_allclose(d["condition"], [0, 1, 3e12])


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
