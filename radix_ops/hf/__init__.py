"""A transformers model that computes each shared token of a batch once: `enable(model)`, then call it as before.

What stands in for what while a model is enabled, all of it undone by `disable`:

- the forward of the decoder stack, which folds the batch, runs the stack on the rows and unfolds its hidden states;
- the forward of the model around it, which sees labels, says when a batch must not be folded because of them, and runs
  a language model's head on rows where nothing else reads the hidden states;
- of sentence-transformers' models, the methods that run batches of texts, so that shared prefixes meet in a batch.

Configs, weights, hooks and classes stay untouched, and nothing but arguments carries a batch to the layers. So calls
from several threads, and forwards that wait for their backward with gradient checkpointing, can't mix up batches.
"""

from ._enable import disable, enable, folded
from .stats import RadixStats

__all__ = ["RadixStats", "disable", "enable", "folded"]
