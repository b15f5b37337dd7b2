"""What attention is: pure functions on tensors, each with its definition in plain PyTorch.

Needs torch and numpy alone. Where Triton and a GPU are present a function hands over to the kernel
of the same name in `headwise.kernels`.
"""

from headwise.functional.head_stats import HeadStats, head_stats, weights_stats

__all__ = ["HeadStats", "head_stats", "weights_stats"]
