"""headwise: a laboratory for attention heads."""
