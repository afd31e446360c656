"""A module over again, for captures of its backward."""

from __future__ import annotations

import copy
from operator import attrgetter, getitem, is_
from typing import Any

from torch import Tensor, nn

from .watch import Forwards, Watch

# What nn.Module calls around a backward; a graph would leave it out.
_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


class Twin:
    """A copy of a module, which has no `why_not`, whose weights are leaves of their own in the same memory.

    A backward pass of the copy has nothing to do with what hangs on the module's own weights: their gradients, hooks
    and streams. It is made when it is first asked for. The rest tells whether the module is still the one of the copy.
    """

    def __init__(self, module: nn.Module, forwards: Forwards):
        self._watch = Watch(module, forwards)
        attributes = [vars(part) for part in module.modules()]
        found: dict[int, Any] = {}
        for own in attributes:
            for name, weight in own["_parameters"].items():
                if weight is not None:
                    found.setdefault(id(weight), (own["_parameters"], name))
        self._dicts, self._names = [entries for entries, _ in found.values()], [name for _, name in found.values()]
        self.weights: list[Tensor] = self._read()
        self.needs = self._needed(self.weights)  # which of them have gradients
        # Those of the module itself are called around its forward, whatever that does.
        self._hooks = [own[name] for own in attributes[1:] for name in _HOOKS]
        self._made: tuple[nn.Module, list[Tensor]] | None = None

    def _read(self) -> list[Any]:
        """Return the weights, none where one is missing."""
        try:
            return [*map(getitem, self._dicts, self._names)]
        except KeyError:
            return []

    @staticmethod
    def _needed(weights: list[Tensor]) -> list[bool]:
        return [*map(attrgetter("requires_grad"), weights)]

    def may_replay(self, module: nn.Module) -> bool:
        """Return whether `module` is the one of the copy, with the same weights, and the same of them frozen."""
        weights = self._read()
        return (
            self._watch.may_replay(module)
            and len(weights) == len(self.weights)
            and all(map(is_, weights, self.weights))
            and self._needed(weights) == self.needs
        )

    def is_unchanged(self) -> bool:
        """Return whether all that a forward depends on is what it was."""
        return self._watch.is_unchanged()

    def has_hooks(self) -> bool:
        """Return whether a part of the module has a hook of its backward."""
        return any(self._hooks)

    def made(self, module: nn.Module) -> tuple[nn.Module, list[Tensor]]:
        """Return the copy of the module, and its weights in the order of `weights`."""
        if self._made is None:
            leaves = {id(weight): nn.Parameter(weight.detach(), weight.requires_grad) for weight in self.weights}
            memo: dict[int, Any] = dict(leaves)
            # Compiled code is that of the module.
            memo |= {id(part): part for part in module.modules() if vars(part).get("_compiled_call_impl") is not None}
            twin = copy.copy(module)
            vars(twin)["_modules"] = copy.deepcopy(module._modules, memo)
            self._made = twin, [leaves[id(weight)] for weight in self.weights]
        return self._made
