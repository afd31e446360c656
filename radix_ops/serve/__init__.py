"""A server of embeddings, rankings, labels and log-probabilities; requests that share prefixes meet in a batch.

It needs the extra `serve`: pip install --no-build-isolation '.[serve]'.
"""
