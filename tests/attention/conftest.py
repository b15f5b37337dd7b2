"""Fresh random inputs in every session, and the seed that repeats one."""

from __future__ import annotations

import os
import secrets
import zlib

import pytest
import torch

SESSION_SEED = int(os.environ.get("HEADWISE_TEST_SEED") or secrets.randbelow(2**31))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch from the session's seed and the test's name; a failing test shows the former."""
    print(f"repeat these inputs with HEADWISE_TEST_SEED={SESSION_SEED}")
    value = SESSION_SEED ^ zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value
