"""Where a function hands over to its kernel: on a GPU, where Triton is installed.

The environment variable HEADWISE_KERNELS=0 turns all kernels off; it is read once, when headwise is imported.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

HAS_KERNELS = importlib.util.find_spec("triton") is not None and os.environ.get("HEADWISE_KERNELS") != "0"
WIDEST_HEAD = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fits_kernel(x: Tensor, width: int = WIDEST_HEAD) -> bool:
    """Whether kernels take x `(…, D)`: on a GPU, not empty, in a dtype that they know, D at most `width`.

    In 16 bits D must be even: an odd one is read number by number (`headwise.functional.layout`).
    """
    known = HAS_KERNELS and x.is_cuda and x.dtype in DTYPES and x.numel() > 0
    return known and x.shape[-1] <= width and x.shape[-1] * x.element_size() % 4 == 0
