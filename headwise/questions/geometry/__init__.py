"""What the weights of a head alone tell about it, and whether that predicts how it attends."""
