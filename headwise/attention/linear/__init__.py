"""`linear`: attention with positive features in place of the softmax."""

from headwise.attention.linear.layer import LinearAttention

__all__ = ["LinearAttention"]
