"""The report's section on entropies: how they develop in training, and what they correlate with."""
