"""The way from rows to the scores of their labels: by a classification head, or by the prompt of a language model."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from .batches import Compute
from .chat import chat_of
from .classifying import RESERVED_KEYS, Row
from .errors import TooLong, UserError
from .inputs import Record, check_text, kind_of
from .items import Items
from .label_prompts import SPECIAL_TOKENS, LabelPrompt
from .label_words import LabelWords
from .messages import Turn
from .runners import Runner
from .tokenizing import cutting_right, in_turn

_AT_ONCE = 256  # rows given to the tokenizer
T = TypeVar("T")


class Reader(ABC):
    """The way from a row to the scores of its labels, by a kind of model."""

    identity: tuple  # what decides about scores beside the tokens

    @abstractmethod
    def parse(self, record: Record) -> Row:
        """Return the row of a record of texts. UserError for one that can't be used."""

    @abstractmethod
    def encode(self, rows: Iterable[Row]) -> Items:
        """Return the token sequences of the rows. UserError for a row that the model can't read."""

    def sequences(self, where: str, ids: Any) -> tuple[Any, ...]:
        """Return the sequences of a row whose token ids are given."""
        return (ids,)

    @abstractmethod
    def compute(self, runner: Runner) -> Compute:
        """Return the function that computes the numbers of a batch's sequences."""

    @abstractmethod
    def scores(self, numbers: np.ndarray) -> np.ndarray:
        """Return the score of each label, float64 [labels], by the numbers of a row's sequences."""


class HeadReader(Reader):
    """A classification head on texts, or on pairs of texts. `reading` gives the tokenizer and the most tokens of a row,
    when texts are read."""

    def __init__(self, labels: Sequence[str], problem: str, cuts: bool, reading: Callable[[], tuple[Any, int | None]]):
        self._labels, self._problem, self._cuts, self._reading = labels, problem, cuts, reading
        self.identity = (tuple(labels), problem)

    def parse(self, record: Record) -> Row:
        return Row(record.where, content_of(record), record.others(("text", "text_pair"), RESERVED_KEYS))

    def encode(self, rows: Iterable[Row]) -> Items:
        encoded = Items()
        for part in parts_of(rows, _AT_ONCE):
            is_pair = [isinstance(row.content, tuple) for row in part]
            found: dict[bool, Iterator[list[int]]] = {}
            for kind in set(is_pair):
                found[kind] = iter(self._ids([row for row, pair in zip(part, is_pair, strict=True) if pair == kind]))
            for row, pair in zip(part, is_pair, strict=True):
                encoded.append([self._fitted(row, next(found[pair]))])
        return encoded

    def _ids(self, rows: list[Row], **options: Any) -> list[list[int]]:
        tokenizer, _ = self._reading()
        texts = [row.content for row in rows]
        columns = [list(column) for column in zip(*texts, strict=True)] if isinstance(texts[0], tuple) else [texts]
        with in_turn(tokenizer):
            batch = tokenizer(*columns, verbose=False, **options)
        if any(map(any, batch.get("token_type_ids", []))):
            raise UserError(
                "the model's tokenizer marks which text a token is of, which radix-ops classify can't pass on"
            )
        return batch["input_ids"]

    def _fitted(self, row: Row, ids: list[int]) -> list[int]:
        tokenizer, max_length = self._reading()
        if not ids:
            raise UserError(f"{row.where} yields no tokens")
        if max_length is None or len(ids) <= max_length:
            return ids
        if not self._cuts:
            raise TooLong(
                f"{row.where} takes {len(ids)} tokens, and the most are {max_length}; --truncate-right drops tokens "
                "from its end, of a pair's longer text"
            )
        with cutting_right(tokenizer):
            return self._ids([row], truncation="longest_first", max_length=max_length)[0]

    def compute(self, runner: Runner) -> Compute:
        classifier: Any = runner

        def compute(indices: np.ndarray, inputs: list[np.ndarray]) -> tuple[np.ndarray]:
            logits = classifier.logits(inputs)
            if logits.shape[1] != len(self._labels):
                raise UserError(
                    f"the model's head gives {logits.shape[1]} numbers, and its config has {len(self._labels)} labels"
                )
            return (logits.cpu().numpy(),)

        return compute

    def scores(self, numbers: np.ndarray) -> np.ndarray:
        logits = numbers[0].astype(np.float64)
        if self._problem == "regression":
            return logits
        if self._problem == "multi_label_classification":
            return np.exp(-np.logaddexp(0.0, -logits))
        return _softmax(logits)


class PromptReader(Reader):
    """A language model on the prompts that a template makes of rows."""

    def __init__(self, tokenizer: Any, prompt: LabelPrompt, max_length: int | None):
        self._tokenizer, self._prompt, self._max_length = tokenizer, prompt, max_length
        self.words = LabelWords(tokenizer, prompt.words)
        self.identity = (prompt.identity, self.words.ids)
        self._tokens, self._chat, self._before = self._special_tokens(), None, []
        if prompt.chat:
            if not getattr(tokenizer, "chat_template", None):
                raise UserError('the template has "chat": true, and the model\'s tokenizer has no chat template')
            self._chat = chat_of(tokenizer, prompt.system or "", prompt.chat_arguments)
        else:
            self._before = _tokens_before(tokenizer)

    def _special_tokens(self) -> dict[str, str]:
        """Return the special tokens that the template reads, by name."""
        found = {}
        for name in SPECIAL_TOKENS:
            if self._prompt.text is not None and name in self._prompt.text.fields:
                token = getattr(self._tokenizer, name, None)
                if token is None:
                    raise UserError(f"the template reads {name}, which the model's tokenizer lacks")
                found[name] = str(token)
        return found

    def parse(self, record: Record) -> Row:
        content, used = self._content(record)
        return Row(record.where, content, record.others(used, RESERVED_KEYS))

    def _content(self, record: Record) -> tuple[Any, tuple[str, ...]]:
        """Return what of a row is read, and the keys that hold it."""
        prompt = self._prompt
        if prompt.text is not None:
            text = check_text(prompt.text.render(record.fields | self._tokens, record.where), record.where)
            if not prompt.chat and text[-1:] in (" ", "\t"):
                raise UserError(
                    f"{record.where}: its prompt ends in a space, which is of the next word's token: take it out of "
                    'the template, and put it before the labels\' words (" yes")'
                )
            return ([("user", text)] if prompt.chat else text), tuple(prompt.fields)
        if "messages" in record.fields:
            return _turns(record), ("messages",)
        return [("user", record.text("text"))], ("text",)

    def encode(self, rows: Iterable[Row]) -> Items:
        encoded = Items()
        for part in parts_of(rows, _AT_ONCE):
            for row, ids in zip(part, self._in_chat(part) if self._chat else self._as_texts(part), strict=True):
                if not ids:
                    raise UserError(f"{row.where}: its prompt yields no tokens")
                encoded.append(self.sequences(row.where, ids))
        return encoded

    def sequences(self, where: str, ids: Any) -> tuple[Any, ...]:
        size = len(ids) + max(map(len, self.words.suffixes))
        if self._max_length is not None and size > self._max_length:
            raise TooLong(
                f"{where} takes {size} tokens with the labels' words, and the most are {self._max_length}; a template "
                "can cut a field: {{ text[:4000] }}"
            )
        return tuple([*ids, *suffix] for suffix in self.words.suffixes)

    def _in_chat(self, rows: list[Row]) -> Iterator[list[int]]:
        assert self._chat is not None
        for row in rows:
            try:
                yield self._chat.ids([row.content])[0]
            except UserError as error:
                raise UserError(f"{row.where}: {error}") from error

    def _as_texts(self, rows: list[Row]) -> Iterator[list[int]]:
        with in_turn(self._tokenizer):
            batch = self._tokenizer([row.content for row in rows], add_special_tokens=False, verbose=False)
        for ids in batch["input_ids"]:
            starts = bool(self._before) and ids[: len(self._before)] == self._before
            yield ids if starts else self._before + ids

    def compute(self, runner: Runner) -> Compute:
        return self.words.scorer(runner)

    def scores(self, numbers: np.ndarray) -> np.ndarray:
        logprobs = self.words.label_logprobs(numbers)
        return _softmax(logprobs) if self._prompt.score == "softmax" else np.exp(logprobs)


def content_of(record: Record) -> str | tuple[str, str]:
    """Return the text of a record, or its pair of texts."""
    text = record.text("text")
    # A tokenizer that is called with one pair, as transformers' pipeline does, takes an empty text for none.
    if "text_pair" in record.fields and (pair := record.text("text_pair")):
        return text, pair
    return text


def parts_of(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the rows in lists of `size`."""
    rows = iter(rows)
    while part := list(itertools.islice(rows, size)):
        yield part


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def _tokens_before(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text; those behind it would end the prompt."""
    with in_turn(tokenizer):
        whole, alone = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return whole[:start]
    raise UserError("the model's tokenizer makes other tokens of a text where it puts special tokens around it")


def _turns(record: Record) -> list[Turn]:
    given = record.fields["messages"]
    if not isinstance(given, list) or not given:
        raise UserError(f'{record.where}: "messages" is {kind_of(given)}; it must be an array of one message at least')
    turns = []
    for index, message in enumerate(given):
        where = f"{record.where}: messages[{index}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise UserError(f'{where} must be an object {{"role": "user", "content": "..."}}')
        turns.append((check_text(message["role"], f"{where}.role"), check_text(message["content"], f"{where}.content")))
    return turns
