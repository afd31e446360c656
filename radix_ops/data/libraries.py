"""The libraries that some kinds of files need, imported when such a file is read."""

from __future__ import annotations

import importlib
from typing import Any

from ..engine.errors import needs


def pyarrow(what: str, module: str = "pyarrow") -> Any:
    """Return the module of pyarrow. UserError where it isn't installed; `what` is the message's subject."""
    needs("pyarrow", "data", what)
    return importlib.import_module(module)
