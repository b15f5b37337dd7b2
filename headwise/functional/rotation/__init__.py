"""The inverse of rotary position embeddings."""
