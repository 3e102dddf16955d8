"""A grid of runs: which cells there are, where their files lie, and how they are run."""
