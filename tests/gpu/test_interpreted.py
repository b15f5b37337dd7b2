"""What `make test-gpu` checks, as far as a CPU can: kernels in Triton's interpreter, and the oracles."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headwise.functional import own_mask_attention
from tests.gpu.long import NAMES, long_head_stats, long_selective, many_heads, selective_in_blocks

CPU = torch.device("cpu")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_agree_with_the_definition_whatever_the_memory_layout() -> None:
    program = Path(__file__).with_name("interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == 31
    assert not [found for found in outcomes if not found["passed"]]


def test_the_oracle_of_long_texts_is_the_gradient_of_the_definition() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(1, 1, 23, 8, dtype=torch.float64, requires_grad=True) for _ in NAMES]
    upstream = torch.randn(23, 8, dtype=torch.float64)
    y = own_mask_attention(*leaves, scale=0.3, select_scale=0.2)
    gradients = torch.autograd.grad(y, leaves, upstream[None, None])
    found = selective_in_blocks(tuple(x.detach()[0, 0] for x in leaves), upstream, 0.3, 0.2, rows=5)
    torch.testing.assert_close(found["y"], y.detach()[0, 0])
    for name, gradient in zip(NAMES, gradients, strict=True):
        torch.testing.assert_close(found[f"d_{name}"], gradient[0, 0], msg=name)


def test_large_cases_pass_when_small() -> None:
    outcomes = [long_selective(CPU, 50, torch.float32, own, rows=16) for own in (True, False)]
    outcomes += [long_head_stats(CPU, 50, torch.float32, rows=16), many_heads(CPU, batch=3)]
    assert not [found for found in outcomes if not found.passed]
