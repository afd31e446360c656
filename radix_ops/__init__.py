"""Shared prefixes of a batch, computed once: fold a batch into a prefix trie, run the model on the trie's rows.

    batch = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, 4]])  # 6 tokens, 4 rows
    out = attention(q, k, v, batch)  # of rows, as q, k and v are
    tokens = batch.unfold(out)  # of packed tokens

`fold` and `pack` make a FoldedBatch of packed tokens, folded and for comparison not. `activate_flash_attention` takes
FlashAttention 3 or 4 where it is installed, and `current_flash_attention` tells which is in use. The rest stands in
modules, which are imported by name; `help` of each leads on:

    radix_ops.hf             enable(model): a model of transformers or sentence-transformers folds its batches
    radix_ops.trainers       enable(trainer): a Trainer of transformers or TRL does
    radix_ops.engine         Scorer, Embedder, Reranker: what the command does, in Python
    radix_ops.serve          create_app: what the command does, over HTTP
    radix_ops.lm_eval        RadixLM: a model of lm-evaluation-harness
    radix_ops.losses         log-probabilities, entropies and cross entropy from rows, without logits for all of them
    radix_ops.models.qwen3   a Qwen3 on folded batches, to read
    radix_ops.plan           which sequences share a batch
    radix_ops.ops            the ops of torch.ops.radix on which all else stands
    radix_ops.compat         the API of the radix-mlp package, with radix_ops.compat.torch
    radix_ops.reference      the ops in plain Python, to read

The command is radix-ops, or python -m radix_ops, and main of radix_ops.cli: score, embed, rerank,
classify, serve and inspect.
"""

from pathlib import Path

from . import _threads  # noqa: F401  isort: skip  (imports torch)

import torch

__version__ = "0.1.0"
_OLDEST_TORCH = (2, 11)


def _load_extension() -> None:
    oldest = ".".join(map(str, _OLDEST_TORCH))
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < _OLDEST_TORCH:
        raise ImportError(
            f"radix_ops needs torch >= {oldest}, but torch {torch.__version__} is installed: "
            f"pip install --upgrade 'torch>={oldest}'"
        )
    library = Path(__file__).with_name("_C.abi3.so")
    if not library.exists():
        raise ImportError(
            f"radix_ops was not built: {library} is missing. In a source tree, run `make build`; "
            "elsewhere, install it from a checkout: pip install --no-build-isolation ."
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"radix_ops was built for another system or torch than torch {torch.__version__} here ({error}): build it "
            "again in a checkout, pip install --force-reinstall --no-deps --no-build-isolation ."
        ) from error


_load_extension()

from . import ops  # noqa: E402  (registers fakes and autograd on the schemas that the extension defines)
from ._attention import attention  # noqa: E402
from .batch import FoldedBatch, fold, pack  # noqa: E402
from .ops.flash_packages import activate_flash_attention, current_flash_attention  # noqa: E402

__all__ = [
    "FoldedBatch",
    "activate_flash_attention",
    "attention",
    "current_flash_attention",
    "fold",
    "ops",
    "pack",
]
