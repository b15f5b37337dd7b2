"""Watch a running model: measure every head, capture its tensors.

The package is the function, too: `headwise.watch(model)`, whatever was imported before.
"""

import sys
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

from headwise.watch.observe import Watch, watch

__all__ = ["Watch", "watch"]


class _Package(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> AbstractContextManager[Watch]:
        return watch(*args, **options)


sys.modules[__name__].__class__ = _Package
