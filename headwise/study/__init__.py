"""Studies: variants x axes x seeds, planned, executed and shown."""
