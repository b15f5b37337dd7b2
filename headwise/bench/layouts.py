"""The same numbers in other memory layouts, and memory that holds NaN: for tests and checks of kernels.

A kernel that takes a tensor's strides for granted reads its neighbours. Here these are NaN.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LAYOUTS = (
    "contiguous", "heads inside", "width outside", "every second", "cut",
    "one batch", "one head", "one token", "one number",
)  # fmt: skip
"""Names that `laid_out` takes; the last four repeat an entry by a stride of 0."""

KEEPING = LAYOUTS[:5]
"""Layouts that keep every number."""


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A view with the shape of x in another layout, differentiable.

    Args:
        x: `(B, H, T, D)`; a tensor of fewer dimensions takes the layouts that it has dimensions for, and
            otherwise `every second`.
        layout: contiguous; heads inside, stored `(B, T, H, D)`; width outside, stored `(B, H, D, T)`; every
            second, numbers with NaN between them; cut, out of wider rows that hold NaN; one batch, head,
            token or number, which is repeated.
    """
    gap = torch.nan if x.is_floating_point() else 0
    repeated = {"one batch": 0, "one head": 1, "one token": -2, "one number": -1}
    if layout in repeated and x.dim() == 4:
        return x.narrow(repeated[layout], 0, 1).expand(x.shape)
    if layout == "contiguous":
        return x.contiguous()
    if layout == "heads inside" and x.dim() == 4:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "width outside" and x.dim() >= 2:
        return x.mT.contiguous().mT
    if layout == "cut":
        return F.pad(x, (3, 6), value=gap)[..., 3:-6]
    return torch.stack((x, torch.full_like(x, gap)), dim=-1)[..., 0]


def drawn(generator: random.Random, names: Sequence[str], varied: Collection[str]) -> dict[str, str]:
    """A layout for each tensor; of those that are not `varied` (or all would be equal) numbers are kept."""
    return {name: generator.choice(LAYOUTS if name in varied else KEEPING) for name in names}


def poison(device: torch.device, megabytes: int = 64) -> None:
    """Leave NaN in the memory that the allocator hands out next; does nothing on a CPU.

    Blocks of many sizes, since a request is served by a block of about its size.
    """
    if device.type != "cuda":
        return
    held = []
    for power in range(9, 27):
        for _ in range(4):
            if 4 << power <= megabytes << 20:
                held.append(torch.full((1 << power,), torch.nan, device=device))
    torch.cuda.synchronize(device)
    del held
