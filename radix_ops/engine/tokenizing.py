"""Turns at a tokenizer that several engines and threads share: a call changes the tokenizer while it runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from .errors import UserError

_guard = threading.Lock()
_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of a lock each


@contextlib.contextmanager
def in_turn(tokenizer: Any) -> Iterator[Any]:
    """Hold the tokenizer, and yield it: a call with truncation=True makes all calls beside it cut their texts, too."""
    with _guard:
        lock = _locks.setdefault(tokenizer, threading.RLock())
    with lock:
        yield tokenizer


@contextlib.contextmanager
def cutting_right(tokenizer: Any) -> Iterator[Any]:
    """Hold the tokenizer with truncation_side "right", and put back the side that it had."""
    with in_turn(tokenizer):
        before = tokenizer.truncation_side
        tokenizer.truncation_side = "right"
        try:
            yield tokenizer
        finally:
            tokenizer.truncation_side = before


def check_tokenizer(tokenizer: Any) -> None:
    """UserError for what is no tokenizer of transformers."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"tokenizer is a {type(tokenizer).__name__}; it must be a tokenizer of transformers, as "
            "AutoTokenizer.from_pretrained makes"
        )
