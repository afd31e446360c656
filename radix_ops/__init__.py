"""Shared prefixes of a batch, computed once: fold a batch into a prefix trie, run the model on the trie's rows."""

from pathlib import Path

from . import _threads  # noqa: F401  isort: skip  (imports torch)

import torch

__version__ = "0.1.0"
_OLDEST_TORCH = (2, 11)


def _load_extension() -> None:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < _OLDEST_TORCH:
        raise ImportError(
            f"radix_ops needs torch >= {'.'.join(map(str, _OLDEST_TORCH))}, but torch {torch.__version__} is installed"
        )
    library = Path(__file__).with_name("_C.abi3.so")
    if not library.exists():
        raise ImportError(
            f"radix_ops was not built: {library} is missing. In a source tree, run `make build`; "
            "elsewhere, install it from a checkout: pip install --no-build-isolation ."
        )
    torch.ops.load_library(library)


_load_extension()

from . import ops  # noqa: E402  (registers fakes and autograd on the schemas that the extension defines)
from ._attention import attention  # noqa: E402
from .batch import FoldedBatch, fold, pack  # noqa: E402

__all__ = ["FoldedBatch", "attention", "fold", "ops", "pack"]
