"""The loss while only a share of the context is kept."""
