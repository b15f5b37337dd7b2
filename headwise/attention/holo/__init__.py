"""`holo`: holographic attention, at the boundary of a ball or as a superposition of bound pairs."""

from headwise.attention.holo.layer import HoloAttention

__all__ = ["HoloAttention"]
