"""Profile a checkpoint: every measure of every head over many contexts."""
