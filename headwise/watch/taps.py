"""Where a watch looks into running modules: one patch of `nn.Module.__call__`, and nothing on a module.

A copy of a tapped model, by `copy.deepcopy`, pickle or `torch.save`, is therefore an ordinary model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[nn.Module, Any], None]


@dataclass(eq=False)
class Tap:
    """What to call before a module runs, with its arguments, and after it, with its output.

    `after` is given None where the module raised.
    """

    before: Before | None = None
    after: After | None = None


_taps: dict[nn.Module, list[Tap]] = {}
_plain: list[Any] = []
_watching_eagerly: list[Any] = []
_patching = threading.RLock()


def recomputing() -> bool:
    """Whether this thread runs inside a backward pass, where a forward is a checkpoint computed again."""
    return bool(torch._C._current_graph_task_id() != -1)


def tap(module: nn.Module, before: Before | None = None, after: After | None = None) -> Callable[[], None]:
    """Call `before(module, args, kwargs)` and `after(module, output)` around each forward of `module`.

    Recomputation in a backward pass calls neither.

    Returns:
        A function that takes the tap off again; it may be called twice.
    """
    new = Tap(before, after)
    with _patching:
        if not _taps:
            _plain.append(nn.Module.__call__)
            setattr(nn.Module, "__call__", _call_tapped)  # noqa: B010 - mypy knows it as a method
        _taps.setdefault(module, []).append(new)

    def remove() -> None:
        with _patching:
            here = _taps.get(module, [])
            if new not in here:
                return
            here.remove(new)
            if not here:
                del _taps[module]
            if not _taps:
                setattr(nn.Module, "__call__", _plain.pop())  # noqa: B010

    return remove


def _call_tapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    call = _plain[-1] if _plain else nn.Module.__call__
    taps = tuple(_taps.get(self, ()))
    if not taps or recomputing():
        return call(self, *args, **kwargs)
    for one in taps:
        if one.before is not None:
            one.before(self, args, kwargs)
    output = None
    try:
        output = call(self, *args, **kwargs)
    finally:
        for one in taps:
            if one.after is not None:
                one.after(self, output)
    return output


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled code as it was written inside the block, so that taps see it; compiled graphs are kept."""
    with _patching:
        if not _watching_eagerly:
            _watching_eagerly.append(torch.compiler.set_stance("force_eager"))
            _watching_eagerly[0].__enter__()
        _watching_eagerly.append(None)
    try:
        yield
    finally:
        with _patching:
            _watching_eagerly.pop()
            if len(_watching_eagerly) == 1:
                _watching_eagerly.pop().__exit__(None, None, None)
