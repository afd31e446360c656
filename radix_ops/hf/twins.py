"""Twins of a module: shallow copies that share all with it but what is replaced. For `radix_ops.hf`.

A model that other threads and later backward passes use, too, is never changed for a call. What the call needs
otherwise stands in copies of the modules that hold it, and of those around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


def shallow_copy(original: T, **changed: Any) -> T:
    """Return an object of the same class and attributes but for those that are `changed`."""
    copied = object.__new__(type(original))
    copied.__dict__.update(original.__dict__, **changed)
    if isinstance(original, nn.Module):
        copied.__dict__["_compiled_call_impl"] = None  # a compiled call is bound to the original
    return copied


def twin_of(module: nn.Module, changes: Callable[[nn.Module], dict[str, Any]]) -> nn.Module:
    """Return `module` with other attributes, in itself and in what it holds, by what `changes` says for each module."""
    return _rebuilt(module, changes(module), twin_of, changes)


def with_part(module: nn.Module, part: nn.Module, replacement: nn.Module) -> nn.Module:
    """Return `module` with `replacement` wherever it holds `part`."""
    return replacement if module is part else _rebuilt(module, {}, with_part, part, replacement)


def _rebuilt(module: nn.Module, changed: dict[str, Any], rebuild: Callable[..., nn.Module], *further) -> nn.Module:
    """Return `module` with attributes `changed` and of each child what `rebuild(child, *further)` makes of it."""
    children = {
        name: new
        for name, child in module._modules.items()
        if child is not None and (new := rebuild(child, *further)) is not child
    }
    if children:
        changed = {**changed, "_modules": {**module._modules, **children}}
    return shallow_copy(module, **changed) if changed else module
