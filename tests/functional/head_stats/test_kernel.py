"""The head statistics kernels against the definition in float64, in Triton's interpreter on a CPU.

What a GPU computes is checked by `python -m headwise.bench head-stats --device cuda`, which also
holds for bf16 and long sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CASES = (
    "causal", "full", "window", "wide window", "full window", "softcap", "scales", "bias",
    "bias, softcap, full", "padding", "left padding", "documents", "documents, padding, window",
    "documents, full, bias", "one token", "float16, width 80", "small pool", "flat",
    "sharp, half the mass", "equal weights", "three kinds of keys", "two sinks", "nan",
)  # fmt: skip
# Relative to 1 + |value|; k_eff is exact.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def errors(interpreted: Callable[[str], list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Errors of every case, from one run of the interpreter."""
    return {line["case"]: line["errors"] for line in interpreted("head_stats")}


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_agree_with_the_definition(case: str, errors: dict[str, dict[str, float]]) -> None:
    found = dict(errors[case])
    assert len(found) == 13
    assert found.pop("k_eff") == 0
    assert max(found.values()) <= TOLERANCE, found


def test_every_case_is_checked(errors: dict[str, dict[str, float]]) -> None:
    assert sorted(errors) == sorted(CASES)
