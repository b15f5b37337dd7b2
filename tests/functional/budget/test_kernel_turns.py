"""The kernel of a context budget against the definition, in Triton's interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_every_key_leaves_at_the_same_query(interpreted: Callable[[str], list[dict[str, Any]]]) -> None:
    lines = interpreted("turns")
    assert len(lines) == 10
    assert all(line["same"] for line in lines), lines
