"""The kernels of tropical attention against the definition in float64, in Triton's interpreter on a CPU.

On a GPU `headwise bench tropical` and `make test-gpu` check them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_results_margins_and_gradients_are_the_definitions(
    interpreted: Callable[[str], list[dict[str, Any]]],
) -> None:
    found = {line["case"]: line["errors"] for line in interpreted("tropical")}
    assert len(found) == 10
    for case, errors in found.items():
        rounding = {"bfloat16": 2.0**-8, "float16, full": 2.0**-11}.get(case, 0.0)
        assert max(errors.values()) <= rounding, (case, errors)
