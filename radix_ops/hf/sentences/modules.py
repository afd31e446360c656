"""The modules that sentence-transformers puts around transformers models, and what they read. For `radix_ops.hf`.

sentence-transformers is never imported here: whoever has one of its models has imported it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..._interrupts import uninterrupted
from ..calls import Obstacle
from ..forward import obstacle_outside
from ..proofs import class_of, no_model_in

_ENCODERS = ("SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder")
_OLDEST = "5.0.0"
# Features that hold something for every position; modules may read masked positions or not.
_OF_POSITIONS = ("token_embeddings", "causal_logits")
SIDES = {"left": 0, "right": -1}  # of a batch, and their outermost columns


class Method:
    """Stands in for a method of one module. An object and not a closure, so that it copies and pickles with the module.

    It is an attribute of the module itself, which goes before the method of its class.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.previous = vars(module).get(name)

    @property
    def __wrapped__(self):
        """The method that stood here before, where inspect.signature finds the arguments."""
        return self.previous or types.MethodType(getattr(class_of(self.module), self.name), self.module)

    def install(self) -> None:
        vars(self.module)[self.name] = self

    def remove(self) -> None:
        if self.previous is None:
            del vars(self.module)[self.name]
        else:
            vars(self.module)[self.name] = self.previous


def library():
    """Return sentence-transformers if somebody has imported it, else None."""
    return sys.modules.get("sentence_transformers")


def find_encoder(model: nn.Module) -> nn.Module | None:
    """Return the SentenceTransformer, CrossEncoder or other model of that library in `model`, or None."""
    classes = tuple(getattr(library(), name) for name in _ENCODERS if hasattr(library(), name))
    return next((module for module in model.modules() if isinstance(module, classes)), None)


def owners_to_fold(encoder: nn.Module) -> list[PreTrainedModel]:
    """Return the outermost transformers models in an encoder: several where it routes inputs to one or another.

    Raises ValueError for an encoder that can't be folded, and TypeError for one that holds none.
    """
    name, version = type(encoder).__name__, library().__version__
    if Version(version) < Version(_OLDEST):
        raise ValueError(f"{name} can be folded from sentence-transformers {_OLDEST} on, and this is {version}")
    if isinstance(encoder, getattr(library(), "MultiVectorEncoder", ())):
        raise ValueError(f"{name} can't be folded: its scores may read hidden states at masked positions")
    owners = _outermost(encoder)
    if not owners:
        raise no_model_in(encoder)
    return owners


def _outermost(module: nn.Module) -> list[PreTrainedModel]:
    found: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and part not in inside:
            found.append(part)
            inside.update(part.modules())
    return found


def _stages(encoder: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield each module of an encoder that holds a transformers model, and the modules that its features go on to.

    A module comes once for each route that leads through it.
    """
    if not isinstance(encoder, nn.Sequential):
        return  # CrossEncoder up to 5.3 is a transformers model with nothing behind it
    for path in _paths(list(encoder._modules.values())):
        for place, module in enumerate(path):
            if any(isinstance(part, PreTrainedModel) for part in module.modules()):
                yield module, path[place + 1 :]


def _paths(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Yield all ways through modules, of which some (Router, Asym) have several routes."""
    for place, module in enumerate(modules):
        routes = getattr(module, "sub_modules", None)
        if isinstance(routes, nn.ModuleDict):
            for route in routes.values():
                parts = [part for part in route._modules.values() if part is not None]
                yield from _paths([*modules[:place], *parts, *modules[place + 1 :]])
            return
    yield modules


class Reading(NamedTuple):
    """The sides on which padding matters to the modules behind a transformers model."""

    states: frozenset[str] = frozenset()  # they read hidden states at masked positions
    width: frozenset[str] = frozenset()  # their result changes with the number of masked positions


_UNKNOWN = Reading(frozenset(SIDES), frozenset(SIDES))


class TransformerForward(Method):
    """Stands in for the forward of a module that holds a transformers model: knows who reads its hidden states."""

    def __init__(self, module: nn.Module, encoder: nn.Module):
        super().__init__(module, "forward")
        self.encoder = encoder
        self._known: tuple[Any, Reading] | None = None

    @torch.compiler.disable(recursive=False)
    def __call__(self, features, *args, **kwargs):
        token = obstacle_outside.set(self._obstacle(features))
        try:
            return self.__wrapped__(features, *args, **kwargs)
        finally:
            obstacle_outside.reset(token)

    @torch.compiler.disable
    def _obstacle(self, features) -> Obstacle | None:
        read = self.reading().states
        mask = features.get("attention_mask") if read else None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.numel() == 0:
            return None
        if any(not bool(mask[:, SIDES[side]].all()) for side in read):
            name = type(self.module).__name__
            return Obstacle(
                f"a module behind {name} reads hidden states at masked positions; texts of one length have none"
            )
        return None

    def reading(self) -> Reading:
        """Return what is read by the modules as they are at this moment."""
        tails = [following for module, following in _stages(self.encoder) if module is self.module]
        settings = [[(part, _settings(part)) for module in tail for part in module.modules()] for tail in tails]
        if self._known is None or self._known[0] != settings:
            found = [self._try(tail) for tail in tails] or [_UNKNOWN]
            self._known = settings, Reading(*(frozenset().union(*sides) for sides in zip(*found, strict=True)))
        return self._known[1]

    def _try(self, following: list[nn.Module]) -> Reading:
        if not type(self.module).forward.__module__.startswith(f"{library().__name__}."):
            return _UNKNOWN  # another package's forward may read anything
        name = getattr(self.module, "module_output_name", None) or "token_embeddings"
        if name not in _OF_POSITIONS or not following:
            return Reading()
        model = _outermost(self.module)[0]
        config = model.config.get_text_config()
        size = config.hidden_size if name == "token_embeddings" else config.vocab_size
        parameter = next(model.parameters())
        states = torch.randn(len(_LENGTHS), max(_LENGTHS), size, generator=torch.Generator().manual_seed(0))
        return _try(following, name, states.to(parameter.device, parameter.dtype))

    def __getstate__(self):
        return {**vars(self), "_known": None}


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the plain values of a module, which may decide how it computes and which users may change."""
    plain = (str, int, float, tuple, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, plain) and name != "training"}


_LENGTHS = (5, 3, 4)  # of the sequences with which `_try` runs modules


@torch.no_grad()
def _try(modules: list[nn.Module], name: str, states: Tensor) -> Reading:
    """Return what modules read, found by running them on the same sequences with other padding.

    Modules that fail may read anything.
    """
    training = {part: part.training for module in modules for part in module.modules()}
    read, width = set(), set()
    try:
        for part in training:
            part.training = False
        for side in SIDES:
            try:
                short, wide, filled = (
                    _result(modules, name, *_padded(states, side, padding, fill))
                    for padding, fill in ((0, 0.0), (3, 0.0), (3, 50.0))
                )
            except Exception:  # users' modules, called with less than they may need, may raise anything
                return _UNKNOWN
            read |= {side} if _differ(wide, filled) else set()
            width |= {side} if _differ(wide, short) or _differ(wide, filled) else set()
    finally:
        with uninterrupted():
            for part, was in training.items():
                part.training = was
    return Reading(frozenset(read), frozenset(width))


def _padded(states: Tensor, side: str, padding: int, fill: float) -> tuple[Tensor, Tensor]:
    """Return sequences of _LENGTHS, the longest with `padding` masked positions on that side, and their mask [B, T]."""
    mask = torch.zeros(len(_LENGTHS), max(_LENGTHS) + padding, dtype=torch.int64, device=states.device)
    padded = torch.full((*mask.shape, states.shape[2]), fill, device=states.device, dtype=states.dtype)
    for row, length in enumerate(_LENGTHS):
        columns = slice(None, length) if side == "right" else slice(-length, None)
        mask[row, columns] = 1
        padded[row, columns] = states[row, :length]
    return padded, mask


def _result(modules: list[nn.Module], name: str, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
    features = {name: states, "attention_mask": mask, "input_ids": mask.clone(), "prompt_length": 1, "modality": "text"}
    given = dict(features)
    for module in modules:
        features = module(features)
    return {
        key: value.double()
        for key, value in features.items()
        if key not in (*_OF_POSITIONS, "attention_mask") and isinstance(value, Tensor) and value is not given.get(key)
    }


def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() != other.keys() or any(
        one[key].shape != other[key].shape or not torch.allclose(one[key], other[key], rtol=1e-2, atol=1e-3)
        for key in one
    )


def is_cross_encoder(encoder: nn.Module) -> bool:
    return isinstance(encoder, library().CrossEncoder)


def transformer_forwards(encoder: nn.Module) -> list[TransformerForward]:
    """Return one for each module of an encoder that holds a transformers model; none is in place yet."""
    return [TransformerForward(module, encoder) for module in {module: None for module, _ in _stages(encoder)}]


def is_installed(encoder: nn.Module) -> bool:
    return bool(_installed(encoder))


def remove(encoder: nn.Module) -> None:
    """Take all stand-ins away, from the encoder and from its modules."""
    for method in _installed(encoder):
        method.remove()


def _installed(encoder: nn.Module) -> list[Method]:
    modules = {encoder: None, **{module: None for module, _ in _stages(encoder)}}
    return [method for module in modules for method in vars(module).values() if isinstance(method, Method)]
