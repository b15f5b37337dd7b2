"""Watch a running model: measure every head, capture its tensors, profile a checkpoint."""

from headwise.probe.collector import Collector, measure
from headwise.probe.observe import Watch, watch

__all__ = ["Collector", "Watch", "measure", "watch"]
