"""What `make test-gpu` checks, as far as a CPU can: kernels in Triton's interpreter, and the oracles."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import headwise.functional
from headwise.functional import own_mask_attention
from tests.gpu.long import NAMES, long_head_stats, long_selective, many_heads, run, selective_in_blocks

CPU = torch.device("cpu")


HAS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def in_interpreter(program: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    """What `interpreted.py` prints, line by line."""
    done = in_interpreter(Path(__file__).with_name("interpreted.py"))
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@HAS_TRITON
def test_kernels_agree_with_the_definition_in_any_layout(
    interpreted: list[dict[str, Any]],
) -> None:
    *outcomes, _ = interpreted
    assert len(outcomes) == 52
    assert not [found for found in outcomes if not found["passed"]]


@HAS_TRITON
def test_every_kernel_was_watched_and_kept_to_its_arguments(interpreted: list[dict[str, Any]]) -> None:
    kernels = set()
    for path in Path(headwise.functional.__file__).parent.rglob("kernel*.py"):
        names = re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
        kernels |= {f"{path.stem}.{name}" for name in names}
    assert set(interpreted[-1]["kernels"]) == kernels
    assert interpreted[-1]["accesses"] > 100_000


PAST_THE_END = """
import torch, triton, triton.language as tl
from tests.gpu.addresses import addresses_watched

@triton.jit
def copy_kernel(x_ptr, y_ptr, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < count, other=0.0), mask=at < count)

x = torch.randn(8)[:5]
with addresses_watched():
    copy_kernel[(1,)](x, torch.empty(8), 5, SIZE=8)
    print("inside")
    copy_kernel[(1,)](x, torch.empty(8), 6, SIZE=8)
"""


@HAS_TRITON
def test_an_access_past_the_end_of_an_argument_is_an_error(tmp_path: Path) -> None:
    program = tmp_path / "past_the_end.py"
    program.write_text(PAST_THE_END)
    done = in_interpreter(program)
    assert done.stdout == "inside\n"
    assert "past_the_end.copy_kernel: a load of 1 addresses, 4 bytes outside" in done.stderr


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


def test_a_case_whose_process_ends_does_not_end_the_others() -> None:
    cases = [("large offsets", partial(os._exit, 1)), ("large grids", partial(many_heads, CPU, batch=2))]
    ended, fine = run(CPU, cases)
    assert ended.family == "large offsets"
    assert not ended.passed
    assert fine.passed
