"""The arguments of the `radix-ops` command: options, help and errors of usage, which need no torch.

What a command does stands in `radix_ops.cli`, which is imported when it is time to run.
"""

from ._main import main, options_of
from .parser import UsageError

__all__ = ["UsageError", "main", "options_of"]
__version__ = "0.1.0"
