"""The engine below `Scorer`, `Embedder` and `Reranker`: a model with its tokenizer, and the way of inputs through it.

Each input goes these steps, which a server or a cluster may take apart:

    item = engine.parse(Record("items[0]", fields))  # checked
    items = engine.encode([item])  # the token sequences of each item
    engine.execute(items, on_batch)  # planned batches with sequences of several items
    engine.result(item, items[0], *numbers)  # one object an item, of what a Collector gathered of the batches
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, Set
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from .._attention import Layout
from ..plan.budget import Budget, find_budget
from . import ids
from .arguments import DTypeName, check_flags, check_options, dtype_name
from .batches import Compute, OnBatch, Pass, RunStats
from .errors import UserError, WrongType, options_as_arguments
from .inputs import Record, kind_of
from .items import Collector, Items
from .loading import (
    check_is_decoder,
    check_model,
    config_of,
    context_length,
    find_device,
    has_tokenizer,
    load_config,
    load_runner,
    load_tokenizer,
    runner_of,
)
from .runners import Runner
from .shapes.recognition import recognised
from .tokenizing import check_tokenizer

I = TypeVar("I")  # noqa: E741 (an item)
E = TypeVar("E", bound="Engine")
OnProgress = Callable[[int, int], object]


class Engine(ABC, Generic[I]):
    """A model, its tokenizer and how it is run; see `Scorer` for the arguments."""

    task: ClassVar[str]  # the command's word for what is done
    stride: int | None = None  # of windows over texts that are too long
    _given_length: int | None = None  # tokens at most, as an argument has it

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any,
        *,
        source: str | None = None,  # the model's folder, where `model` names a larger one
        device: str | torch.device | None,
        dtype: DTypeName | torch.dtype | None,
        token_budget: int | None,
        layout: Layout,
        plain: bool,
        trust_remote_code: bool,
    ):
        check_options(layout, token_budget)
        check_flags(plain=plain, trust_remote_code=trust_remote_code)
        self.layout, self.plain, self._trust = layout, plain, trust_remote_code
        self._budget = None if token_budget is None else Budget(token_budget)
        self._model: nn.Module | None = None
        self._runner: Runner | None = None
        self._checked: set[bool] = set()  # the modes, folded or not, that the model is known to run in
        self._lock = threading.RLock()  # the model serves one thread at a time; tokenizers have locks of their own
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise UserError("a loaded model needs its tokenizer beside it: tokenizer=...")
            if device is not None or dtype is not None:
                raise UserError("a loaded model has its device and dtype; model.to(...) changes them")
            self._model, self.name, self.config = model, type(model).__name__, config_of(model)
        elif isinstance(model, (str, os.PathLike)):
            self.name = os.fspath(model)
            self._source = source or self.name
            self._device, self._dtype = find_device(device), dtype_name(dtype)
            self.config = load_config(self._source, trust_remote_code=trust_remote_code)
        else:
            config_of(model)  # which refuses it
        check_is_decoder(self.name, self.config)
        if tokenizer is not None:
            check_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._is_prepared = False

    def _finish(self, lazy: bool) -> None:
        """End the construction: check what the tokenizer decides, if there is one, and load the weights."""
        if self._tokenizer is not None or (not lazy and has_tokenizer(self._source)):
            self.prepare()
        if not lazy:
            self.load()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded if it isn't yet."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._source, trust_remote_code=self._trust)
                check_tokenizer(self._tokenizer)
            return self._tokenizer

    def prepare(self) -> None:
        """Get ready to read texts. UserError where the tokenizer can't be loaded or doesn't fit to what is asked for.

        Records of token ids need none of it.
        """
        if not self._is_prepared:
            self._check_reading()
            self._is_prepared = True

    def _check_reading(self) -> None:
        """UserError where texts can't be read as asked for."""
        assert self.tokenizer is not None

    @property
    def rows_of(self) -> str:
        """The task whose rows of the hub are known."""
        return self.task

    @property
    @abstractmethod
    def auto_class(self) -> str:
        """The class of transformers that loads the model."""

    @property
    @abstractmethod
    def identity(self) -> tuple:
        """Return what decides about results beside the model, an item's fields, its tokens and the mode."""

    def parse(self, record: Record) -> I:
        """Return the item of a record of texts or of token ids. UserError for one that can't be used."""
        parse_ids: Any = ids.PARSERS.get(self.task)
        if parse_ids is not None and ids.holds_ids(record, self.task):
            self._check_ids(record.where)
            return parse_ids(record, self._limits)
        item = self._parse(record)
        self.prepare()
        return item

    def _check_ids(self, where: str) -> None:
        """UserError where records of token ids lack what was asked for."""

    @functools.cached_property
    def _limits(self) -> ids.Limits:
        size = getattr(self.config.get_text_config(), "vocab_size", None)
        return ids.Limits(size, self._given_length or context_length(self.config, None), self.stride)

    def encode(self, items: Iterable[I]) -> Items:
        """Return the token sequences of the items. UserError for an item that the model can't read."""
        return ids.encode_each(items, self._encode_items)

    def cutting(self: E) -> E:
        """Return this engine as one that cuts texts that are too long, where its task can. Both share the model."""
        with self._lock:
            self.load()
            twin = copy.copy(self)
        twin._cut()
        return twin

    def _cut(self) -> None:
        """Cut texts that are too long from here on."""

    def result(self, item: I, encoded: list, *numbers: np.ndarray) -> dict[str, Any]:
        """Return the output object of an item by what `encode` made of it and its sequences' numbers, an array of each
        kind, or none for an item of no sequences. UserError for a number that isn't finite."""
        found = self._result(item, encoded, *numbers)
        return ids.without_texts(found) if isinstance(item, ids.Given) else found

    @abstractmethod
    def _parse(self, record: Record) -> I:
        """Return the item of a record of texts."""

    @abstractmethod
    def _encode_items(self, items: Iterable[I]) -> Items:
        """Return the token sequences of items of texts."""

    @abstractmethod
    def _compute(self, items: Any) -> Compute:
        """Return the function that computes the numbers of a batch's sequences."""

    @abstractmethod
    def _result(self, item: I, encoded: list, *numbers: np.ndarray) -> dict[str, Any]:
        """Return the output object of an item, of texts or not."""

    @property
    def runner(self) -> Runner:
        """The model in its runner, loaded if it isn't yet."""
        with self._lock:
            if self._runner is None:
                self._runner = self._load(self._pad_token_id())
            return self._runner

    @property
    def model(self) -> nn.Module:
        """The model, loaded if it isn't yet."""
        return self.runner.model

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.runner.device

    def load(self) -> None:
        """Load the weights, if they aren't yet."""
        with options_as_arguments():
            assert self.runner is not None

    def _pad_token_id(self) -> int | None:
        return 0

    def _load(self, pad_token_id: int | None) -> Runner:
        if self._model is not None:
            runner = runner_of(self._model, pad_token_id, self.layout)
        else:
            runner = load_runner(
                self._source, self.config, self.auto_class, self._dtype, self._device, self._trust, pad_token_id,
                self.layout,
            )  # fmt: skip
        if runner.head is None and self.auto_class == "AutoModelForCausalLM":
            raise UserError(f"{type(runner.model).__name__} has no output head; {type(self).__name__} needs one")
        return runner

    def check(self, items: Items, folded: bool) -> None:
        """UserError unless the model has the items' tokens, and can be run as wanted; it tries a few of them."""
        check_model(self.model)
        if not len(items.store):
            return
        largest = int(items.store.input_ids.max())
        if largest >= self.runner.vocab_size:
            raise UserError(
                f"the tokenizer yields token {largest} and the model embeds {self.runner.vocab_size}: they don't fit "
                "together"
            )
        if self._checked.isdisjoint({folded, True}):
            self.runner.check(items.store[0], folded)
            self._checked.add(folded)

    def budget_of(self, items: Items) -> Budget:
        """Return the rows of a batch: those that were given, or what fits into the memory that is free."""
        if self._budget is not None:
            return self._budget
        runner, longest = self.runner, int(items.lengths.max())
        dtype = next(runner.model.parameters()).dtype
        return find_budget(runner.hf_config, dtype, runner.device, longest, runner.own_attention)

    def begin(self, items: Items, *, folded: bool | None = None) -> Pass:
        """Return the way of all sequences of `items`, one at least, through the model in planned batches, which has yet
        to be gone. UserError as `check` has it."""
        folded = not self.plain if folded is None else folded
        with self._lock:
            self.check(items, folded)
            return Pass(self.runner, items, self.budget_of(items), folded, self._compute(items))

    def execute(self, items: Items, on_batch: OnBatch | None = None, *, folded: bool | None = None) -> RunStats:
        """Take all sequences of `items` through the model in planned batches; `Pass` says what `on_batch` gets.

        Threads take turns. UserError as `check` has it, before anything runs.
        """
        with self._lock:
            if not len(items.store):
                return RunStats()
            whole = self.begin(items, folded=folded)
            whole.advance(on_batch)
            return whole.stats

    def _results(self, items: list[I], on_progress: OnProgress | None) -> list[dict[str, Any]]:
        """Return the result of each item, all planned together."""
        with options_as_arguments(), self._lock:
            encoded = self.encode(items)
            collector, results = Collector(encoded.ends), [dict[str, Any]()] * len(items)

            def keep(complete: Iterator[tuple[int, list[np.ndarray]]]) -> None:
                for index, numbers in complete:
                    results[index] = self.result(items[index], encoded[index], *numbers)

            def on_batch(indices: np.ndarray, found: tuple[np.ndarray, ...]) -> None:
                keep(collector.add(indices, found))

            keep(collector.empty())
            self.execute(encoded, with_progress(on_batch, encoded, on_progress))
            return results

    def _stream(self, items: Iterator[I], window: int, on_progress: OnProgress | None) -> Iterator[dict[str, Any]]:
        """Yield the result of each item in order, `window` of them planned together."""
        for part in windows(items, window):
            yield from self._results(part, on_progress)

    def _parsed(self, fields: Iterable[Mapping[str, Any]], name: str, shape: str) -> Iterator[I]:
        """Yield the items of an argument that holds an object for each."""
        for where, given in numbered(fields, name, f"objects like {shape}"):
            if not isinstance(given, Mapping):
                raise UserError(f"{where} is {kind_of(given)}; it must be an object like {shape}")
            record = Record(where, {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()})
            item: Any = self.parse(recognised(self.rows_of, record))
            yield dataclasses.replace(item, extra=_copied(where, item.extra))


def numbered(inputs: Iterable, name: str, what: str) -> Iterator[tuple[str, object]]:
    """Yield (where, input) of an argument's inputs. UserError for an argument that is no iterable of several."""
    iterator = iterator_of(inputs, name)
    if iterator is None:
        raise UserError(f"{name} is {kind_of(inputs)}; it must be a list, or another iterable, of {what}")
    for index, given in enumerate(iterator):
        yield f"{name}[{index}]", given


def iterator_of(inputs: object, name: str) -> Iterator | None:
    """Return an iterator over an argument's inputs; None where it is one input, or an array of no dimensions.

    WrongType for a set or a view of a dict: results come in the inputs' order, and a set has none that holds.
    """
    if isinstance(inputs, (Set, MappingView)):
        raise WrongType(
            f"{name} is a {type(inputs).__name__}, and results come in the order of their inputs; it must be a list, "
            "or another iterable with an order of its own: sorted(...) or list(...) makes one"
        )
    if isinstance(inputs, (str, bytes, Mapping)) or not isinstance(inputs, Iterable):
        return None
    try:
        return iter(inputs)
    except TypeError:
        return None


def _copied(where: str, extra: dict) -> dict:
    """Return a copy of an input's other keys for its result, which shares nothing with the input."""
    try:
        return copy.deepcopy(extra)
    except Exception as error:  # an object may refuse in any way
        raise UserError(f"{where} has a key whose value can't be copied to the result: {error}") from error


def windows(items: Iterable[I], size: int) -> Iterator[list[I]]:
    """Yield the items in lists of `size`."""
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise UserError(f"window must be a whole number from 1, got {size!r}")
    items = iter(items)
    while True:
        with options_as_arguments():
            part = list(itertools.islice(items, int(size)))
        if not part:
            return
        yield part


def with_progress(on_batch: OnBatch, items: Items, on_progress: OnProgress | None) -> OnBatch:
    """Return an `on_batch` that tells `on_progress(done, total)` of the tokens that are done, too."""
    if on_progress is None:
        return on_batch
    if not callable(on_progress):
        raise UserError(f"on_progress must be a function of (done, total), or None, got {on_progress!r}")
    lengths, done = items.lengths, 0
    total = int(lengths.sum())

    def report(indices: np.ndarray, found: tuple[np.ndarray, ...]) -> None:
        nonlocal done
        on_batch(indices, found)
        done += int(lengths[indices].sum())
        on_progress(done, total)

    return report
