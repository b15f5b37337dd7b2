"""The language model that holds the attention."""
