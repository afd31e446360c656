"""Reference models on folded batches, one file each."""
