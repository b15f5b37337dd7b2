"""`selective`: attention whose queries mask keys for later queries."""

from headwise.attention.selective.layer import SelectiveAttention

__all__ = ["SelectiveAttention"]
