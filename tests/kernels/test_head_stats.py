"""The head statistics kernels against the definition in float64, in Triton's interpreter on a CPU.

What a GPU computes is checked by `python -m headwise.bench head-stats --device cuda`, which also
holds for bf16 and long sequences.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = (
    "causal", "full", "window", "wide window", "full window", "softcap", "scales", "bias",
    "bias, softcap, full", "padding", "one token", "float16, width 80", "small pool", "flat",
    "sharp, half the mass", "equal weights", "three kinds of keys", "two sinks", "nan",
)  # fmt: skip
# Relative to 1 + |value|; k_eff is exact.
TOLERANCE = 2e-6

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """Errors of every case, from one run of the interpreter."""
    program = Path(__file__).with_name("interpreted_head_stats.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["case"]: line["errors"] for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_agree_with_the_definition(case: str, errors: dict[str, dict[str, float]]) -> None:
    found = dict(errors[case])
    assert len(found) == 10
    assert found.pop("k_eff") == 0
    assert max(found.values()) <= TOLERANCE, found


def test_every_case_is_checked(errors: dict[str, dict[str, float]]) -> None:
    assert sorted(errors) == sorted(CASES)
