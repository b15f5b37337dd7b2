"""headwise: a laboratory for attention heads.

Train language models whose attention is exchangeable, measure every head while it runs, intervene,
and conclude. The command line is `headwise --help`; in Python, `headwise.watch(model)` measures the
heads of a running model.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`headwise.watch`, imported when it is used: torch takes seconds."""
    if name == "watch":
        from headwise.watch import watch

        return watch
    raise AttributeError(f"module 'headwise' has no attribute {name!r}")
