"""Which token of a prompt was masked by which other token, and when."""
