from __future__ import annotations

import pytest
import torch

from tests.fixtures.samples import Rows


@pytest.fixture
def rows() -> Rows:
    return Rows(torch.randint(1, 64, (3, 20), generator=torch.Generator().manual_seed(3)))
