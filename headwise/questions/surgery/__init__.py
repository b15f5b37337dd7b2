"""A new head in a trained model."""
