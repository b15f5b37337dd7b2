"""Watch a running model: measure every head, capture its tensors."""

from headwise.watch.observe import Watch, watch

__all__ = ["Watch", "watch"]
