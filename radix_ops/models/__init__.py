"""Reference models on folded batches, and how their configs and weights are read."""
