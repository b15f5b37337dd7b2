"""Settings that all tests share."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

from tests.fixtures.checkpoints import checkpoint
from tests.fixtures.models import hf_model, tokens
from tests.fixtures.studies import built, demo, make

__all__ = ["built", "checkpoint", "demo", "hf_model", "make", "tokens"]

# A busy machine is no failure, and continuous integration gives the same verdict on the same commit.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")

# What a shell starts in the background inherits that Ctrl-C is ignored, and so would the commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
