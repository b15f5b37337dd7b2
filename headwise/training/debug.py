"""Find the module that first makes a NaN or an infinity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class NonFiniteOutput(Exception):
    """A module's output is not finite; the message names the first such module."""


@contextmanager
def checked_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Inside, every module's output is checked as it is computed.

    Yields:
        A list that gets a line for each output with NaN or infinity, in the order of computation.
    """
    found: list[str] = []

    def check(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
                    bad = int((~torch.isfinite(tensor)).sum())
                    found.append(
                        f"{name} ({type(module).__name__}) is the first module with a non-finite output: "
                        f"{bad} of {tensor.numel()} values, shape {tuple(tensor.shape)}"
                    )

        return hook

    handles = [m.register_forward_hook(check(name)) for name, m in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
