"""The kernel that undoes a rotation against the formula, in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from headwise.kernels.rotation import unrotate
from headwise.probe.rotation import Convention, Form, Tables, _unrotate

torch.manual_seed(0)
for layout in ("half", "interleaved", "split"):
    for start, pairs, batch in ((0, 12, 1), (0, 6, 2), (12, 6, 1)):
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(2, 21, 3, 24, dtype=dtype).transpose(1, 2)
            tables = Tables(*torch.randn(2, batch, 1, 21, pairs), Form("once", False))
            expected = _unrotate(x, tables, Convention(0, layout, start))
            got = unrotate(x, tables.cos, tables.sin, start,
                           from_halves=layout != "interleaved", to_halves=layout == "half")
            assert got.dtype == dtype
            torch.testing.assert_close(got, expected, msg=f"{layout} {start} {pairs} {batch} {dtype}")
print("agree")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_agrees_with_the_formula() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "agree\n", done.stderr[-2000:]
