"""The kernel of decoding against the definition in float64, in Triton's interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_the_kernel_agrees_with_the_definition(interpreted: Callable[[str], list[dict[str, Any]]]) -> None:
    errors = {line["case"]: line["error"] for line in interpreted("slot_attention")}
    assert len(errors) == 10
    assert max(errors.values()) < 2e-6, errors
