"""What `radix_ops.hf.enable` does to models of sentence-transformers: their batches of texts share prefixes."""
