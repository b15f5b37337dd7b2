"""The kernel that undoes a rotation against the formula, in Triton's interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_the_kernel_agrees_with_the_formula(interpreted: Callable[[str], list[dict[str, Any]]]) -> None:
    assert len(interpreted("rotation")) == 22
