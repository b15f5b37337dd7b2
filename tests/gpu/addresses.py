"""Every address that a kernel touches in Triton's interpreter: inside one of its arguments, or an error.

On a GPU the caching allocator's neighbouring memory hides an access past the end of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter


def extent(x: Tensor) -> tuple[int, int]:
    """Addresses from the first entry of x to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + ((last + 1) * x.element_size() if x.numel() else 0)


class Watched:
    """Kernels launched, and how many of their accesses were looked at."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.accesses = 0
        self._name = ""
        self._arguments: list[tuple[int, int]] = []

    def enter(self, name: str, arguments: list[Any]) -> None:
        self.kernels.add(name)
        self._name = name
        self._arguments = [extent(x) for x in arguments if isinstance(x, Tensor)]

    def look(self, kind: str, pointers: Any, mask: np.ndarray) -> None:
        """Raise IndexError where an active address is not inside an argument of the kernel at work."""
        at = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(at.shape, dtype=bool)
        for first, end in self._arguments:
            inside |= (at >= first) & (at + size <= end)
        self.accesses += at.size
        if not inside.all():
            wrong = int(at[~inside][0])
            off = min((max(first - wrong, wrong + size - end) for first, end in self._arguments), default=0)
            raise IndexError(f"{self._name}: {kind} of {(~inside).sum()} addresses, {off} bytes outside")


@contextmanager
def addresses_watched() -> Iterator[Watched]:
    """Within it, an access outside of the arguments raises; nothing is copied from or to a device."""
    watched, builder, executor = Watched(), interpreter.interpreter_builder, interpreter.GridExecutor
    call, kept = executor.__call__, {}

    def called(self: Any, *arguments: Any, **options: Any) -> None:
        name = f"{Path(self.fn.__code__.co_filename).stem}.{self.fn.__name__}"
        watched.enter(name, [*arguments, *options.values()])
        call(self, *arguments, **options)

    def wrapped(name: str, look: Callable[..., None]) -> None:
        true = kept[name] = getattr(builder, name)

        def looked(*given: Any, **options: Any) -> Any:
            look(*given, **options)
            return true(*given, **options)

        setattr(builder, name, looked)

    def load(pointers: Any, mask: Any, *_: Any, **__: Any) -> None:
        watched.look("a load", pointers, mask.data)

    def store(pointers: Any, _: Any, mask: Any, *__: Any, **___: Any) -> None:
        watched.look("a store", pointers, mask.data)

    def add(_: Any, pointers: Any, __: Any, mask: Any, *___: Any, **____: Any) -> None:
        watched.look("an atomic", pointers, mask.data)

    wrapped("create_masked_load", load)  # unmasked loads and stores end here, too
    wrapped("create_masked_store", store)
    wrapped("create_atomic_rmw", add)
    executor.__call__ = called
    restore, executor._restore_args_dev = executor._restore_args_dev, lambda *_: None
    try:
        yield watched
    finally:
        for name in kept:
            delattr(builder, name)
        executor.__call__, executor._restore_args_dev = call, restore
