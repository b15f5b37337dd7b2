"""Every kernel against its definition in float64, on a GPU: `make test-gpu`."""

from __future__ import annotations

import pytest

from tests.gpu.conftest import LONG
from tests.gpu.families import FAMILIES, Outcome


@pytest.mark.gpu
@pytest.mark.timeout(580)
@pytest.mark.parametrize("family", [*FAMILIES, *LONG])
def test_every_case_agrees_with_the_definition(family: str, outcomes: dict[str, list[Outcome]]) -> None:
    found = outcomes[family]
    if not found:
        pytest.skip("needs the memory of a GPU")
    wrong = [row for row in found if not row.passed]
    assert not wrong, f"{len(wrong)} of {len(found)}:\n" + "\n".join(map(str, wrong))
