"""Settings that all tests share: the same commit gives the same verdict, in any order of the tests.

`make test-random` draws anew: the profile `random`, with one seed for hypothesis, torch, numpy and random.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.fixtures.checkpoints import checkpoint
from tests.fixtures.models import hf_model, tokens
from tests.fixtures.studies import built, demo, make

__all__ = ["built", "checkpoint", "demo", "hf_model", "make", "tokens"]

# A busy machine is not a failure, so nothing has a deadline.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("fixed")


def _seed(config: pytest.Config) -> int:
    given = str(config.getoption("--hypothesis-seed", default=None) or 0)
    return int(given) if given.isdecimal() else sum(given.encode())


def pytest_report_header(config: pytest.Config) -> Sequence[str]:
    """The seed of a random run, which repeats it."""
    seed = _seed(config)
    return [f"seed {seed}: `make test-random SEED={seed} ROUNDS=1` repeats this round"] if seed else []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give every test the same random numbers, whichever tests ran before it in this process."""
    seed = _seed(item.config)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


# What a shell starts in the background inherits that Ctrl-C is ignored, and so would the commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
