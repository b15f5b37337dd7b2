"""What a head's weights alone say of it: singular values of its two circuits, and their descriptors.

The query-key circuit of head h is `M = W_Kᵀ W_Q` (which directions of the residual stream attend to
which), the value-output circuit `W_O W_V` (what is moved). Both are `(d_model, d_model)` of rank at
most D, so their singular values come from a core of `D x D`; nothing of size d_model² is formed.
Descriptors are those of the head geometry note. Source of the circuits: Elhage et al. 2021, "A Mathematical
Framework for Transformer Circuits".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weight = NDArray[np.floating]

TINY = 1e-12
"""The head geometry note clamps the smallest singular value and every probability here.

Here both are taken relative to the head, the singular value to the largest one, so that a head's
descriptors do not depend on the size of its weights.
"""

DESCRIPTORS = {
    "op_norm": "largest singular value",
    "fro_norm": "root of the sum of squared singular values",
    "trace": "sum of singular values",
    "rank_eff": "sum over largest singular value: how many modes act",
    "spec_entropy": "-Σ p ln p with p = σ²/Σσ², in nats: how flat the spectrum is",
    "anisotropy": "largest over mean singular value; anisotropy · rank_eff = D",
    "condition": "largest over smallest singular value, at most 1e12",
}

MATRICES = ("metric", "core")


def circuit_singular_values(left: Weight, right: Weight, matrix: str = "metric") -> Array:
    """Singular values of one circuit for every head, largest first.

    Args:
        left: `(N, D, d_left)` or `(1, D, d_left)`; W_K of each query head, or W_Oᵀ.
        right: `(H, D, d_right)`; W_Q, or W_V. Leading axes broadcast, so grouped heads may pass the
            shared operand once as `(K, 1, D, d_model)` against `(K, H/K, D, d_model)`.
        matrix: `metric` for `leftᵀ right (d_left, d_right)`; `core` for `left rightᵀ (D, D)`, which
            needs d_left = d_right.

    Returns:
        `(..., min(D, d_left, d_right))`, `(..., D)` for the core; NaN for a head with a weight that is
        not finite.

    Raises:
        ValueError: shapes that do not belong together, or an unknown matrix.
    """
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if left.shape[-2] != right.shape[-2] or (matrix == "core" and left.shape[-1] != right.shape[-1]):
        raise ValueError(f"operands (..., D, d_model) differ: {left.shape} and {right.shape}")
    if matrix not in MATRICES:
        raise ValueError(f"matrix is {matrix!r}; expected one of {', '.join(MATRICES)}")
    finite = np.asarray(np.isfinite(left).all((-2, -1)) & np.isfinite(right).all((-2, -1)))
    left, right = np.nan_to_num(left, posinf=0, neginf=0), np.nan_to_num(right, posinf=0, neginf=0)
    if matrix == "core":
        small = left @ right.swapaxes(-1, -2)
    else:
        # left = (Q_l R_l)ᵀ, right = (Q_r R_r)ᵀ: leftᵀ right = Q_l (R_l R_rᵀ) Q_rᵀ, and Q keeps σ
        small = _triangle(left) @ _triangle(right).swapaxes(-1, -2)
    values = np.linalg.svd(small, compute_uv=False)
    return np.where(finite[..., None], values, np.nan)


def query_key_singular_values(w_q: Weight, w_k: Weight, matrix: str = "metric") -> Array:
    """Singular values of `W_Kᵀ W_Q` per query head.

    Args:
        w_q: `(H, D, d_model)`.
        w_k: `(K, D, d_model)`, `H % K == 0`; query head h reads key head `h // (H / K)`.

    Returns:
        `(H, min(D, d_model))`, largest first.

    Raises:
        ValueError: shapes that do not belong together, or an unknown matrix.
    """
    if np.shape(w_q)[-1] != np.shape(w_k)[-1]:
        raise ValueError(f"operands (..., D, d_model) differ: {np.shape(w_k)} and {np.shape(w_q)}")
    return _grouped(w_k, w_q, matrix)


def value_output_singular_values(w_v: Weight, w_o: Weight, matrix: str = "metric") -> Array:
    """Singular values of `W_O W_V` per query head.

    Args:
        w_v: `(K, D, d_in)`.
        w_o: `(H, d_out, D)`, the columns of the output projection that read head h.

    Returns:
        `(H, min(D, d_in, d_out))`, largest first.
    """
    return _grouped(w_v, np.asarray(w_o).swapaxes(-1, -2), matrix)


def descriptors(singular_values: Weight) -> dict[str, Array]:
    """The descriptors of the head geometry note, named as in `DESCRIPTORS`.

    Args:
        singular_values: `(..., D)`, in any order.

    Returns:
        arrays `(...)`. op_norm, fro_norm and trace scale with the singular values, the others do not
        change. A head of rank 0 has zeros; NaN in is NaN out.
    """
    s = np.asarray(singular_values, np.float64)
    # In units of a power of two near the largest: exact, and squares neither vanish nor overflow.
    exponent = np.frexp(s.max(-1))[1]
    s = np.ldexp(s, -exponent[..., None])
    largest, total, energy = s.max(-1), s.sum(-1), (s**2).sum(-1)
    nothing = largest == 0
    unit = np.where(nothing, 1.0, largest)  # a denominator that only a head of rank 0 changes
    share = np.clip(s**2 / np.where(nothing, 1.0, energy)[..., None], TINY, 1.0)
    with np.errstate(over="ignore"):
        return {
            "op_norm": np.ldexp(largest, exponent),
            "fro_norm": np.ldexp(np.sqrt(energy), exponent),
            "trace": np.ldexp(total, exponent),
            "rank_eff": total / unit,
            "spec_entropy": np.where(nothing, 0.0, -(share * np.log(share)).sum(-1)),
            "anisotropy": largest / np.where(nothing, 1.0, s.mean(-1)),
            "condition": largest / np.maximum(s.min(-1), TINY * unit),
        }


def _triangle(weight: Weight) -> Array:
    """R of the QR decomposition of `weightᵀ`: `(..., D, d_model)` to `(..., min(D, d_model), D)`."""
    return np.asarray(np.linalg.qr(weight.swapaxes(-1, -2), mode="r"))


def _grouped(shared: Weight, own: Weight, matrix: str) -> Array:
    """Singular values for `own (H, D, d_model)`, each group of heads with its `shared (K, D, d_model)`."""
    shared, own = np.asarray(shared, np.float64), np.asarray(own, np.float64)
    if own.shape[0] % shared.shape[0]:
        raise ValueError(f"{own.shape[0]} heads cannot share {shared.shape[0]} key/value heads evenly")
    groups = own.reshape(shared.shape[0], -1, *own.shape[1:])
    return circuit_singular_values(shared[:, None], groups, matrix).reshape(own.shape[0], -1)
