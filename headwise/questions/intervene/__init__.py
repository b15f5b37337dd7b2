"""Scale the query of a head, or remove heads, and measure the effect."""
