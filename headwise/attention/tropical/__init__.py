"""`tropical`: max-plus attention, its options, cache, report section and benchmark."""

from headwise.attention.tropical.config import TropicalConfig
from headwise.attention.tropical.layer import TropicalAttention

__all__ = ["TropicalAttention", "TropicalConfig"]
