"""`differential`: heads that are the difference of two softmaxes."""

from headwise.attention.differential.layer import DifferentialAttention

__all__ = ["DifferentialAttention"]
