"""Scoring, embedding, reranking and classifying with shared prefixes computed once: what the radix-ops command does, in
Python.

    from radix_ops.engine import Classifier, Embedder, Reranker, Scorer, metrics

    results = Scorer("Qwen/Qwen3-0.6B").score([{"context": "Is it wet?", "choices": [" yes", " no"], "gold": "A"}])
    metrics(results)["accuracy"]["sum"]["value"]  # 1.0, with its interval beside it
    Embedder("Qwen/Qwen3-Embedding-0.6B").embed(["a river", "the sea"], prompt_name="query")  # float32 [2, 1024]
    Reranker("Qwen/Qwen3-Reranker-0.6B").rank("a river", ["the Seine", "a hill"], top_k=1)
    Classifier("a model with a classification head").classify([{"text": "a river"}])

Each takes a name (a folder, a hub id, a .gguf file) or a loaded model with its tokenizer, and finds device, dtype and
the size of batches by itself. All inputs of a call are planned together, so that those that share a prefix meet in a
batch; `stream` does so window by window, in bounded memory. Inputs are checked before the model runs: whatever can't be
used is a UserError, a ValueError that names it and the remedy. The engine prints nothing, but warns through `logging`.
"""

from ._classifier import Classifier
from ._embedder import Embedder
from ._reranker import Reranker
from ._scorer import Scorer
from .errors import OutOfMemory, UserError
from .label_prompts import LabelPrompt
from .measures import metrics
from .templates import Template

__all__ = [
    "Classifier", "Embedder", "LabelPrompt", "OutOfMemory", "Reranker", "Scorer", "Template", "UserError", "metrics",
]  # fmt: skip
