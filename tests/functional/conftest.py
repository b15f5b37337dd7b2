"""Kernels on a CPU: programs that run in Triton's interpreter, and what they print."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Lines = list[dict[str, Any]]


@pytest.fixture(scope="session")
def interpreted() -> Callable[[str], Lines]:
    """Runs `*/interpreted_<name>.py` and gives the JSON lines that it printed.

    A program of its own because Triton reads TRITON_INTERPRET when it is imported.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])

    def run(name: str) -> Lines:
        (program,) = Path(__file__).parent.glob(f"*/interpreted_{name}.py")
        done = subprocess.run(
            [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run
