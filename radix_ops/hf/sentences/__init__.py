"""sentence-transformers' models under `radix_ops.hf.enable`: texts that share prefixes meet in a batch."""
