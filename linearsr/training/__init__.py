"""Training: a plain loop, its data and its recipes. Knows nothing of Ray."""
