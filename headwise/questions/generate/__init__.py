"""Text that a run continues, and its costs."""
