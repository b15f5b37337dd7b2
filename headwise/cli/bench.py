"""`headwise bench NAME`: benchmarks that print a table and write JSON with the environment."""

from headwise.bench.command import main

__all__ = ["main"]
