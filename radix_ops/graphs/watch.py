"""Sees whether a model is still what its graphs were captured from."""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

# What nn.Module calls around a forward; a graph would leave it out.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Attributes that tell nothing of a forward without gradients: hooks are looked at by themselves.
_UNREAD = {*vars(nn.Module()), "in_features", "out_features"} - {"training"}
# Values that never change, and functions: an attribute that is the same object is what it was.
_FIXED = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, type, functools.partial,
          types.FunctionType, types.BuiltinFunctionType, types.MethodType)  # fmt: skip
_CONTAINERS = (dict, list, tuple, set, frozenset)

Forwards = Mapping[type[nn.Module], Callable[..., Any]]


def forwards_of(root: nn.Module) -> Forwards:
    """Return the classes that a module holds, itself among them, and their forwards."""
    return {type(module): type(module).forward for module in root.modules()}


def why_not(root: nn.Module, forwards: Forwards | None) -> str | None:
    """Return why no graph may stand in for the module's forward, or None.

    It may where all modules are of known classes, with known forwards, and their weights lie in one device's memory.
    The forward and the hooks of `root` itself are its caller's affair. None for `forwards` says that the caller knows
    the classes; then attributes must be such that `Watch` sees their changes, and weights may be of several dtypes.
    """
    for kind, forward in (forwards or {}).items():
        if kind.forward is not forward:
            return f"the forward of {kind.__qualname__} was replaced"
    first = None
    for module in root.modules():
        own, name_of_class = vars(module), type(module).__qualname__
        if forwards is not None and type(module) not in forwards:
            return f"it holds a {name_of_class}"
        if module is not root and "forward" in own:
            return f"the forward of a {name_of_class} was replaced"
        if module is not root and any(own[name] for name in _HOOKS):
            return f"a {name_of_class} has a hook"
        if own.get("max_norm") is not None:
            return f"a {name_of_class} changes its weight"
        for name, weight in own["_parameters"].items():
            if weight is None:
                continue
            first = weight if first is None else first
            if type(weight) is not nn.Parameter or not weight.is_contiguous():
                return f"the {name} of a {name_of_class} is no plain parameter"
            if (forwards is not None and weight.dtype != first.dtype) or weight.device != first.device:
                return "its weights are of several dtypes or devices"
        if forwards is None and (unseen := _unseen(module, root)) is not None:
            return f"a {name_of_class} holds {unseen}"
    if first is None:  # as replicas of DataParallel
        return "it has no parameters"
    buffers = itertools.chain(*(vars(module)["_buffers"].values() for module in root.modules()))
    if any(x is not None and (type(x) is not Tensor or x.device != first.device) for x in buffers):
        return "it has a buffer of another device or of a class of its own"
    return None


def _unseen(module: nn.Module, root: nn.Module) -> str | None:
    """Return which attribute of a module may change without a watch seeing it, or None."""
    if vars(module).get("_compiled_call_impl") is not None:
        return "code that torch.compile made"
    for name, value in vars(module).items():
        if name in _UNREAD or name == "config" or _is_seen(value):
            continue
        if module is root and (name == "forward" or not isinstance(value, (Tensor, nn.Module))):
            continue  # what stands around the forward hangs on to the root
        return f"{name}, a {type(value).__qualname__}"
    return None


def _is_seen(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_seen, itertools.chain(*value.items())))
    return all(map(_is_seen, value)) if isinstance(value, _CONTAINERS) else isinstance(value, _FIXED)


class Watch:
    """The parts of a module, which has no `why_not`, at one moment: layers, weights, hooks, settings.

    A graph reads weights and buffers by address, so changes in place need no watching. With `keeps_memory` that of
    weights is kept until the watch is dropped, even where they were replaced since, so that a graph never reads what
    is not its own; the module is not. `may_replay` tells whether a graph does no harm at least; `is_unchanged` compares
    all there is, and takes longer, so it is for when the GPU is busy, or before a replay where memory is not kept.
    """

    def __init__(self, root: nn.Module, forwards: Forwards, *, keeps_memory: bool = True):
        # The root's own attributes hold what holds the watch, and would live on with it.
        others = [module for module in root.modules() if module is not root]
        attributes = [vars(root), *map(vars, others)]
        self._root, self._class = weakref.ref(root), type(root)
        self._forwards = forwards
        self._attributes = attributes[1:]
        self._hooks = [own[name] for own in self._attributes for name in _HOOKS]
        self._first_children = _Entries([root._modules])
        self._children = _Entries(own["_modules"] for own in attributes)
        self._classes = [*map(type, self._children.values)]
        lists = [own["_modules"] for own, module in zip(attributes[1:], others, strict=True)
                 if isinstance(module, nn.ModuleList)]  # fmt: skip
        buffers = (own["_buffers"] for own in attributes)
        self._sizes = _Sizes([*self._attributes, *buffers, root._modules, *lists])
        kinds = ("_parameters", "_buffers")
        self._weights = _Weights((own[kind] for own in attributes for kind in kinds), keeps_memory)
        # A token that an embedding does not hold ends the process.
        embeddings = (module._parameters for module in others if isinstance(module, nn.Embedding))
        self._embeddings = _Weights(embeddings, keeps_memory)
        self._settings = _Entries(self._attributes, leave_out=_UNREAD)
        self._contents = _Contents(attributes)
        self._root_settings = _settings_of(root)
        self._config = copy.deepcopy(_fields_of(root))

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
            and [*map(type, self._children.values)] == self._classes
            and self._weights.are_in_place()
            and self._settings.are_the_same()
            and self._contents.are_the_same()
            and _settings_of(root) == self._root_settings
            and _fields_of(root) == self._config
            and all(kind.forward is forward for kind, forward in self._forwards.items())
        )


def _settings_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that are plain values or functions, and the names of all."""
    kinds = int, float, str, types.FunctionType, types.BuiltinFunctionType
    return {name: value if isinstance(value, kinds) else None for name, value in vars(module).items()}


def _fields_of(root: nn.Module) -> dict[str, Any] | None:
    """Return what the config of a module holds; a config's own comparison may leave fields out."""
    config = getattr(root, "config", None)
    return None if config is None else vars(config)


class _Contents:
    """What containers among attributes hold that are not nn.Module's, and configs other than that of the root."""

    def __init__(self, dicts: list[dict[str, Any]]):
        """`dicts` are the attributes of modules, of the root first."""
        values = [value for own in dicts for name, value in own.items() if name not in _UNREAD]
        self._held = [value for value in values if isinstance(value, _CONTAINERS) and _is_seen(value)]
        of_root, *others = (own.get("config") for own in dicts)
        configs = {id(x): x for x in others if x is not of_root and hasattr(x, "__dict__")}
        self._held += map(vars, configs.values())
        self._copies = copy.deepcopy(self._held)

    def are_the_same(self) -> bool:
        return self._held == self._copies


class _Entries:
    """Entries of several dicts, so kept that one call in C reads them all again."""

    def __init__(self, dicts: Iterable[Mapping[str, Any]], leave_out: Iterable[str] = ()):
        found = [(entries, name) for entries in dicts for name in entries if name not in leave_out]
        self._dicts = [entries for entries, _ in found]
        self._names = [name for _, name in found]
        self.values = self._read()

    def _read(self) -> list[Any]:
        """Return the entries, none where one is missing."""
        try:
            return [*map(getitem, self._dicts, self._names)]
        except KeyError:
            return []

    def are_the_same(self) -> bool:
        """Return whether each is the object that it was."""
        values = self._read()
        return len(values) == len(self.values) and all(map(is_, values, self.values))


class _Sizes:
    """How many entries several dicts have."""

    def __init__(self, dicts: list[dict[str, Any]]):
        self._dicts = dicts
        self._counts = [*map(len, dicts)]

    def are_the_same(self) -> bool:
        return [*map(len, self._dicts)] == self._counts


class _Weights:
    """Weights by where they lie, and how. Where their memory is kept, another weight can't lie there."""

    def __init__(self, dicts: Iterable[Mapping[str, Tensor | None]], keeps_memory: bool):
        found = [(entries, name, weight) for entries in dicts for name, weight in entries.items()]
        tensors: list[Any] = [(entries, name, weight) for entries, name, weight in found if weight is not None]
        self._dicts = [entries for entries, _, _ in tensors]
        self._names = [name for _, name, _ in tensors]
        weights = [weight for _, _, weight in tensors]
        self._kept = [weight.untyped_storage() for weight in weights] if keeps_memory else []
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
