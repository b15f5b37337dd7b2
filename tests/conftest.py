"""Settings that all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# A busy machine is no failure, and continuous integration gives the same verdict on the same commit.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")
