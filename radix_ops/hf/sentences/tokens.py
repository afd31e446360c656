"""The tokens of all texts of a call to sentence-transformers, made once and used twice. For `radix_ops.hf`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...plan.planner import TokenStore
from .modules import SIDES, Method

_IDS, _MASK = "input_ids", "attention_mask"
_PLAIN = (str, int, float, type(None))


class Tokens:
    """Holds the tokens of many texts in `store`, and makes the features that the tokenizer would make of some of them.

    constants: whatever else features hold, the same for all texts.
    """

    def __init__(self, encoder: nn.Module, arguments: dict[str, Any]):
        self.encoder, self.arguments = encoder, arguments
        self.store = TokenStore()
        self.constants: dict[str, Any] = {}
        self._index: dict[Any, int] = {}  # places of texts in the store
        self._zeros: set[str] = set()  # names of features that are 0 everywhere
        self._sides: set[str] = set()  # where padding was seen
        self._pad_ids: set[int] = set()  # tokens that were seen there
        self._is_reusable = True

    @classmethod
    def of(
        cls, encoder: nn.Module, batches: Iterable[list], tokenize: Callable, arguments: dict[str, Any]
    ) -> Tokens | None:
        """Return the tokens of all texts of `batches`, or None where `tokenize(texts, **arguments)` makes none."""
        tokens = cls(encoder, arguments)
        for texts in batches:
            features = dict(tokenize(texts, **arguments))
            ids, mask = features.pop(_IDS, None), features.pop(_MASK, None)
            if not _are_tokens(ids, mask, len(texts), features.values()):
                return None
            tokens._add(texts, ids, mask.to(torch.bool), features)
        return tokens

    def _add(self, texts: list, ids: Tensor, real: Tensor, further: dict[str, Any]) -> None:
        lengths = real.sum(1)
        for side, column in SIDES.items():
            if (~real[:, column] & (lengths > 0)).any():
                self._sides.add(side)
        self._pad_ids.update(ids[~real].unique().tolist())
        zeros = {name for name, value in further.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in further.items() if name not in zeros}
        if not len(self.store):
            self.constants, self._zeros = constants, zeros
        self._is_reusable &= constants == self.constants and zeros == self._zeros
        self._is_reusable &= all(isinstance(value, _PLAIN) for value in constants.values())
        self._is_reusable &= not any(further[name].any() for name in zeros)
        sequences = np.split(ids[real].numpy(force=True), lengths.cumsum(0)[:-1].numpy(force=True))
        for text, sequence in zip(texts, sequences, strict=True):
            self._index[_key(text)] = len(self.store)
            self.store.append(sequence)

    @property
    def sides(self) -> set[str]:
        """The sides that padding may stand on, in any batch of the texts."""
        if self._sides or len(set(self.store.lengths.tolist())) == 1:
            return self._sides
        return set(SIDES)

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[None]:
        """Let `Tokenize` of the encoder take tokens from here meanwhile."""
        token = _at_hand.set(self)
        try:
            yield
        finally:
            _at_hand.reset(token)

    def features(self, texts: list) -> dict[str, Any] | None:
        """Return what the tokenizer makes of the texts together, padded to the longest, or None if that isn't known."""
        if not self._is_reusable or len(self.sides) > 1 or len(self._pad_ids) > 1:
            return None
        indices = [self._index.get(_key(text)) for text in texts]
        if not indices or None in indices:
            return None
        sequences = [self.store[index] for index in indices if index is not None]
        width = max(map(len, sequences))
        ids = np.full((len(texts), width), next(iter(self._pad_ids), 0), np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            columns = slice(width - len(sequence), None) if "left" in self.sides else slice(len(sequence))
            ids[row, columns], mask[row, columns] = sequence, 1
        zeros = {name: torch.zeros(ids.shape, dtype=torch.int64) for name in self._zeros}
        return {_IDS: torch.from_numpy(ids), _MASK: torch.from_numpy(mask), **zeros, **self.constants}


# The tokens of the call that an encoder is running.
_at_hand: contextvars.ContextVar[Tokens | None] = contextvars.ContextVar("radix_tokens", default=None)


def _key(text):
    return tuple(text) if isinstance(text, list) else text


def _are_tokens(ids, mask, num_texts: int, further: Iterable) -> bool:
    """Return whether the features are padded tokens [num_texts, T], and all others of the same shape."""
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.dim() != 2 or ids.shape != mask.shape:
        return False
    if len(ids) != num_texts or any(isinstance(value, Tensor) and value.shape != ids.shape for value in further):
        return False
    real = nn.functional.pad(mask.to(torch.bool), (1, 0))
    return bool(((real[:, 1:] & ~real[:, :-1]).sum(1) <= 1).all())  # no holes


class Tokenize(Method):
    """Stands in for an encoder's method that tokenises: takes the tokens of the running call of `encode`."""

    def __call__(self, *args, **kwargs):
        tokens = _at_hand.get()
        features = None
        if tokens is not None and tokens.encoder is self.module and len(args) == 1 and kwargs == tokens.arguments:
            features = tokens.features(args[0])
        return self.__wrapped__(*args, **kwargs) if features is None else features
