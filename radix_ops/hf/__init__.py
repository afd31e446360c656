"""Makes transformers models compute each shared token of a batch once.

    from radix_ops import hf

    hf.enable(model)  # in place; then call it as before
    with hf.folded(model): ...
    hf.disable(model)
    model.radix_stats  # what was folded

`enable` folds a batch where that pays, and lets it run as before where it does not or would be wrong. Its documentation
says which models, calls and outputs that are; docs/models.md lists the model types.

While a model is enabled, these stand in for others, and `disable` takes them away:

- the forward of the decoder stack: it folds the batch, runs the stack on the rows and unfolds its hidden states;
- the forward of the model around it: it sees labels, forbids to fold a batch because of them, and runs a language
  model's head on rows where nothing else reads the hidden states;
- methods of sentence-transformers' models that run batches of texts: they let shared prefixes meet in a batch.

Configs, weights, hooks and classes stay untouched, and only arguments carry a batch to the layers. So calls from
several threads, and forwards that wait for their backward with gradient checkpointing, can't mix up batches.
"""

from ._enable import disable, enable, folded
from .stats import RadixStats

__all__ = ["RadixStats", "disable", "enable", "folded"]
