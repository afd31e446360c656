"""A server of embeddings, rankings, labels and log-probabilities; requests that share prefixes meet in a batch.

    from radix_ops.engine import Embedder
    from radix_ops.serve import create_app

    app = create_app(Embedder("Qwen/Qwen3-Embedding-0.6B", lazy=True))  # uvicorn.run(app)

`radix-ops serve` runs it. It needs the extra `serve`: pip install --no-build-isolation '.[serve]'.
"""

from .app import create_app
from .limits import BatchLimits, QueueLimits
from .settings import Settings

__all__ = ["BatchLimits", "QueueLimits", "Settings", "create_app"]
