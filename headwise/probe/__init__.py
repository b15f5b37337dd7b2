"""Watch a running model: measure every head, capture its tensors, profile a checkpoint."""

from headwise.probe.observe import Collector, Watch, measure, watch

__all__ = ["Collector", "Watch", "measure", "watch"]
