"""The kernel of decoding against the definition in float64, in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_agrees_with_the_definition() -> None:
    program = Path(__file__).with_name("interpreted_slot_attention.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = {line["case"]: line["error"] for line in map(json.loads, done.stdout.splitlines())}
    assert len(errors) == 10
    assert max(errors.values()) < 2e-6, errors
