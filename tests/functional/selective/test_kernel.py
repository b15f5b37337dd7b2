"""The kernels of selective attention against the definition in float64, in Triton's interpreter on a CPU.

What a GPU computes is checked by `python -m headwise.bench selective --device cuda`, in bf16 too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

TOLERANCE = 2e-6
"""Relative error, of norms, in float32."""


@pytest.fixture(scope="module")
def errors(interpreted: Callable[[str], list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Errors of every case, from one run of the interpreter."""
    return {line["case"]: line["errors"] for line in interpreted("selective")}


def test_every_result_and_gradient_agrees_with_the_definition(errors: dict[str, dict[str, float]]) -> None:
    assert len(errors) == 16
    for case, found in errors.items():
        assert {"y", "F", "d_q", "d_k", "d_v", "d_select_q", "d_select_k"} <= set(found), case
        assert max(found.values()) <= TOLERANCE, (case, found)


def test_protection_and_bias_get_their_gradients(errors: dict[str, dict[str, float]]) -> None:
    assert {"d_guard_q", "d_guard_k"} <= set(errors["game, head two"])
    assert "d_bias" in errors["wide selection, bias"]
