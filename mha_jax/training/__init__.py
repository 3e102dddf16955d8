"""Training: the optimiser, the step, the loop, and what a run leaves behind (metrics and checkpoints)."""
