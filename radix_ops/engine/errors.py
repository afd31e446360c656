"""The engine's exceptions."""

from __future__ import annotations


class UserError(ValueError):
    """An input, a model or an option that can't be used; the message is one plain sentence for whoever gave it."""
