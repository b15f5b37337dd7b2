"""Rotary embeddings, undone."""
