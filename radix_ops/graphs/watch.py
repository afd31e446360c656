"""Sees whether a model is still what its graphs were captured from."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter, getitem, is_
from typing import Any

from torch import Tensor, nn

# What nn.Module calls around a forward; a graph would leave it out.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Attributes that tell nothing of a forward without gradients: hooks are looked at by themselves.
_UNREAD = {*vars(nn.Module()), "in_features", "out_features"}

Forwards = Mapping[type[nn.Module], Callable[..., Any]]


def why_not(root: nn.Module, forwards: Forwards) -> str | None:
    """Return why no graph may stand in for the module's forward, or None.

    It may where all modules are of known classes, with known forwards, and their weights lie in one device's memory.
    """
    for kind, forward in forwards.items():
        if kind.forward is not forward:
            return f"the forward of {kind.__qualname__} was replaced"
    first = None
    for module in root.modules():
        own = vars(module)
        if type(module) not in forwards:
            return f"it holds a {type(module).__qualname__}"
        if "forward" in own:
            return f"the forward of a {type(module).__qualname__} was replaced"
        if any(own[name] for name in _HOOKS):
            return f"a {type(module).__qualname__} has a hook"
        if own["_buffers"] or own.get("max_norm") is not None:
            return f"a {type(module).__qualname__} has a buffer, or changes its weight"
        for name, weight in own["_parameters"].items():
            if weight is None:
                continue
            first = weight if first is None else first
            if type(weight) is not nn.Parameter or not weight.is_contiguous():
                return f"the {name} of a {type(module).__qualname__} is no plain parameter"
            if weight.dtype != first.dtype or weight.device != first.device:
                return "its weights are of several dtypes or devices"
    return "it has no parameters" if first is None else None  # as replicas of DataParallel


class Watch:
    """The parts of a module, which has no `why_not`, at one moment: layers, weights, hooks, settings.

    A graph reads weights by address, so changes in place need no watching. The memory of weights is kept until the
    watch is dropped, even where they were replaced since, so that a graph never reads what is not its own; the module
    is not. `may_replay` tells whether a graph does no harm at least; `is_unchanged` compares all there is, and takes
    longer, so it is for when the GPU is busy.
    """

    def __init__(self, root: nn.Module, forwards: Forwards):
        # The root's own attributes hold what holds the watch, and would live on with it.
        others = [module for module in root.modules() if module is not root]
        attributes = [vars(root), *map(vars, others)]
        self._root, self._class = weakref.ref(root), type(root)
        self._forwards = forwards
        self._attributes = attributes[1:]
        self._hooks = [own[name] for own in attributes for name in _HOOKS]
        self._first_children = _Entries([root._modules])
        self._children = _Entries(own["_modules"] for own in attributes)
        lists = [own["_modules"] for own, module in zip(attributes[1:], others, strict=True)
                 if isinstance(module, nn.ModuleList)]  # fmt: skip
        self._sizes = _Sizes([*self._attributes, root._modules, *lists])
        self._weights = _Weights(own["_parameters"] for own in attributes)
        # A token that an embedding does not hold ends the process.
        self._embeddings = _Weights(module._parameters for module in others if isinstance(module, nn.Embedding))
        self._settings = _Entries(self._attributes, leave_out=_UNREAD)
        self._root_settings = _settings_of(root)
        self._config = copy.deepcopy(getattr(root, "config", None))

    def may_replay(self, root: nn.Module) -> bool:
        """Return whether `root` is the module that is watched, and looks tokens up where it did."""
        return (
            self._root() is root
            and type(root) is self._class
            and self._first_children.are_the_same()
            and self._embeddings.are_in_place()
        )

    def is_unchanged(self) -> bool:
        """Return whether all parts, hooks and settings are what they were."""
        root = self._root()
        return (
            root is not None
            and not any(self._hooks)
            and self._sizes.are_the_same()
            and self._children.are_the_same()
            and self._weights.are_in_place()
            and self._settings.are_the_same()
            and _settings_of(root) == self._root_settings
            and getattr(root, "config", None) == self._config
            and all(kind.forward is forward for kind, forward in self._forwards.items())
        )


def _settings_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that are plain values, and the names of all."""
    return {name: value if isinstance(value, (int, float, str)) else None for name, value in vars(module).items()}


class _Entries:
    """Entries of several dicts, so kept that one call in C reads them all again."""

    def __init__(self, dicts: Iterable[Mapping[str, Any]], leave_out: Iterable[str] = ()):
        found = [(entries, name) for entries in dicts for name in entries if name not in leave_out]
        self._dicts = [entries for entries, _ in found]
        self._names = [name for _, name in found]
        self._values = self._read()

    def _read(self) -> list[Any]:
        """Return the entries, none where one is missing."""
        try:
            return [*map(getitem, self._dicts, self._names)]
        except KeyError:
            return []

    def are_the_same(self) -> bool:
        """Return whether each is the object that it was."""
        values = self._read()
        return len(values) == len(self._values) and all(map(is_, values, self._values))


class _Sizes:
    """How many entries several dicts have."""

    def __init__(self, dicts: list[dict[str, Any]]):
        self._dicts = dicts
        self._counts = [*map(len, dicts)]

    def are_the_same(self) -> bool:
        return [*map(len, self._dicts)] == self._counts


class _Weights:
    """Weights by where they lie, and how. Their memory is kept, so another weight can't lie there."""

    def __init__(self, dicts: Iterable[Mapping[str, Tensor | None]]):
        found = [(entries, name, weight) for entries in dicts for name, weight in entries.items()]
        tensors: list[Any] = [(entries, name, weight) for entries, name, weight in found if weight is not None]
        self._dicts = [entries for entries, _, _ in tensors]
        self._names = [name for _, name, _ in tensors]
        weights = [weight for _, _, weight in tensors]
        self._kept = [weight.untyped_storage() for weight in weights]
        self._places, self._layouts = [*map(Tensor.data_ptr, weights)], self._layouts_of(weights)
        self._missing = [(entries, name) for entries, name, weight in found if weight is None]

    def are_in_place(self) -> bool:
        """Return whether each lies where it lay, as it lay there, and none came where there was none."""
        try:
            tensors: list[Any] = [*map(getitem, self._dicts, self._names)]
            return (
                [*map(Tensor.data_ptr, tensors)] == self._places
                and self._layouts_of(tensors) == self._layouts
                and all(entries[name] is None for entries, name in self._missing)
            )
        except (KeyError, RuntimeError, TypeError):  # missing; without memory of its own; None
            return False

    @staticmethod
    def _layouts_of(tensors: list[Any]) -> list[Any]:
        attributes = map(attrgetter("shape"), tensors), map(attrgetter("dtype"), tensors), map(Tensor.stride, tensors)
        return [*itertools.chain(*attributes)]
