"""How spread out the attention of every head is over training, and what goes with it."""
