"""The kernel of a context budget against the definition, in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_key_leaves_at_the_same_query() -> None:
    program = Path(__file__).with_name("interpreted_turns.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = list(map(json.loads, done.stdout.splitlines()))
    assert len(lines) == 10
    assert all(line["same"] for line in lines), lines
