"""The API of the radix-mlp package (arXiv 2601.15013), so that `import radix_ops.compat as radix_mlp` works.

Programs that import from `radix_mlp` and `radix_mlp.torch` find the same names here and in `radix_ops.compat.torch`,
and in errors the phrases that they may look for.
"""

from __future__ import annotations

from ._arrays import compute_fold_and_scatter
from .torch import compute_fold_and_scatter_torch

__all__ = ["compute_fold_and_scatter", "compute_fold_and_scatter_torch"]

# The version of radix-mlp whose interface this is.
__version__ = "0.0.2"
