"""What requests ask of the engine, as work for the batcher: encoded, submitted, and made into results."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..engine import Classifier, Embedder, Reranker, Scorer
from ..engine import computing as kinds
from ..engine._engine import Engine
from ..engine.computing import Chosen, Read
from ..engine.errors import TooLong, UserError
from ..engine.inputs import Record
from ..engine.items import Items
from ..plan import TokenStore
from ..plan.sharing import Sharing
from .batcher import Batcher
from .refusals import Failed, TooLarge
from .work import Answer, Size, Timings, Work

T = TypeVar("T")
Text = str | list[int]  # or its token ids
_REQUEST = "the request"
_NUMBERS_OF_TOP = 16  # that take the place of one likely token, its text and log-probability in an answer
KINDS = {
    "embed": ("pooled", "states"), "rerank": ("logit",), "classify": ("labels",),
    "score": ("choices", "logprobs", "next"),
}  # fmt: skip


@dataclass
class Call:
    """One request on its way: how its inputs are treated, and what it took."""

    salt: str = ""
    deadline: float | None = None
    truncate: bool = False  # texts that are too long
    characters: int = 0
    timings: Timings = field(default_factory=Timings)
    num_cut: int = 0  # texts that lost their end, or their start
    rows: int = 0  # of the request folded alone


class Encoded(NamedTuple):
    """What the answer to a request is made of, beside its numbers."""

    items: list[Any]
    sequences: Items  # of all items
    num_cut: int
    rows: int


class Tasks:
    """Work of an engine's task on a batcher; every method is for the event loop. Raises Refused and UserError."""

    def __init__(self, engine: Engine, batcher: Batcher, max_numbers: int):
        self.engine, self.batcher, self.max_numbers = engine, batcher, max_numbers
        for kind in KINDS[engine.task]:
            batcher.register(kind, functools.partial(self._compute, kind))

    @functools.cached_property
    def _computings(self) -> dict[str, kinds.Computing]:
        return kinds.computings(self.engine)

    def _compute(self, kind: str, sequences: list[np.ndarray], extras: list[Any]) -> Any:
        return self._computings[kind](sequences, extras)

    @functools.cached_property
    def _cutting(self) -> Engine:
        return self.engine.cutting()

    async def embed(
        self, call: Call, texts: Sequence[Text], names: Sequence[str], prompt_name: str | None = None
    ) -> tuple[np.ndarray, list[int]]:
        """Return the poolings of texts, float32 [B, D], and how many tokens each has; `names` name them in errors."""
        answer = await self._embed("pooled", call, texts, names, prompt_name)
        found = np.stack(answer.results)
        self._check_finite(found, names)
        return found, [len(ids) for ids in answer.work.sequences]

    async def states(
        self, call: Call, texts: Sequence[Text], names: Sequence[str], prompt_name: str | None = None
    ) -> list[np.ndarray]:
        """Return the hidden states of all tokens of each text, float32 [L, D]."""
        answer = await self._embed("states", call, texts, names, prompt_name)
        for index, states in enumerate(answer.results):
            self._check_finite(states, [names[index]] * len(states))
        return answer.results

    async def _embed(self, kind: str, call: Call, texts, names, prompt_name) -> Answer:
        engine = self.engine
        assert isinstance(engine, Embedder)

        def encode(engine: Any, items: list[Any]) -> Items:
            return engine.encode(items, prompt_name)

        records = [_record(text, name) for text, name in zip(texts, names, strict=True)]
        extras: Callable[[Any], list[Any]] = lambda sequences: sequences.skips.tolist()  # noqa: E731
        return await self._ask(kind, call, records, size_of(call, texts), extras, encode, _without_key)

    def check_dim(self, dim: int | None) -> None:
        """UserError for more numbers of an embedding than the model has."""
        assert isinstance(self.engine, Embedder)
        kinds.check_dim(self.engine, dim)

    def embeddings(self, pooled: np.ndarray, normalize: bool | None = None, dim: int | None = None) -> np.ndarray:
        """Return the embeddings of poolings, float32 [B, dim]."""
        assert isinstance(self.engine, Embedder)
        return kinds.embeddings(self.engine, pooled, normalize, dim)

    async def relevance(
        self, call: Call, queries: Sequence[Mapping[str, Any]], field: str = "documents"
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Return (scores, logits) of all documents of the queries, float32, and how many tokens they have together.

        queries: objects with "query", "documents" and perhaps "instruction"; `field` names the documents in errors.
        """
        engine = self.engine
        assert isinstance(engine, Reranker)
        records = [Record(_REQUEST, dict(query)) for query in queries]
        size = _size_of(call, [length for query in queries for length in _lengths_of_pairs(query)])
        answer = await self._ask(
            "logit", call, records, size, lambda s: [None] * len(s.store),
            renamed=lambda message: message.replace(f"{_REQUEST}: documents[", f"{field}["),
        )  # fmt: skip
        logits = np.array(answer.results, np.float32)
        scores = kinds.relevance(engine, logits)
        wrong = np.flatnonzero(~np.isfinite(scores))
        if len(wrong):
            raise Failed(f"{field}[{wrong[0]}] got the score {scores[wrong[0]]}; the model needs float32")
        return scores, logits, answer.work.num_tokens

    async def labels(
        self, call: Call, rows: Sequence[Mapping[str, Any]], names: Sequence[str], raw: bool = False
    ) -> tuple[list[np.ndarray], list[int]]:
        """Return the scores of all labels of each row, or with `raw` what stands before them, float64 [labels] in the
        labels' order, and how many tokens each row has."""
        engine = self.engine
        assert isinstance(engine, Classifier)
        records = [Record(name, dict(row)) for name, row in zip(names, rows, strict=True)]
        texts = [text for row in rows for text in row.values() if isinstance(text, (str, list))]

        def places(sequences: Items) -> list[int]:
            return [place for item in range(len(sequences)) for place in range(len(sequences.of(item)))]

        answer = await self._ask("labels", call, records, size_of(call, texts), places, renamed=_without_key)
        found, tokens, encoded = [], [], answer.work.beside
        for index, item in enumerate(encoded.items):
            of = encoded.sequences.of(index)
            numbers = np.stack(answer.results[of.start : of.stop])
            try:
                scores = engine.scores(item, numbers)
            except UserError as error:
                raise Failed(str(error)) from error
            found.append(kinds.label_logits(engine, item, numbers) if raw else scores)
            tokens.append(len(answer.work.sequences[of.start]))
        return found, tokens

    async def choices(self, call: Call, records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict]:
        """Return the result of each question, or text, as `Scorer.score` does."""
        engine = self.engine
        assert isinstance(engine, Scorer)
        given = [Record(name, dict(record)) for name, record in zip(names, records, strict=True)]
        size = _size_of(call, *_lengths_in(records))

        def extras(sequences: Any) -> list[Any]:
            found = []
            for item in range(len(sequences)):
                key = object()
                for context, choice in sequences[item]:
                    found.append(Chosen(key, len(context), int(choice[-1])))
            return found

        answer = await self._ask("choices", call, given, size, extras)
        encoded, results = answer.work.beside, []
        for index, item in enumerate(encoded.items):
            of = encoded.sequences.of(index)
            found = answer.results[of.start : of.stop]
            numbers = (np.array([x for x, _ in found], np.float64), np.array([x for _, x in found], bool))
            try:
                results.append(engine.result(item, encoded.sequences[index], *(numbers if found else ())))
            except UserError as error:
                raise Failed(str(error)) from error
        return results

    async def read(
        self, call: Call, prompts: Callable[[], list[list[int]]], size: Size, count: int
    ) -> tuple[list[list[int]], list[Read]]:
        """Return prompts of token ids with their log-probabilities and the `count` likeliest tokens at each place.

        prompts: makes the ids, none empty, where the batcher tokenises. size: what that is thought to be.
        """
        answer = await self._ids("logprobs", call, prompts, size, count, _NUMBERS_OF_TOP * (1 + count))
        for index, read in enumerate(answer.results):
            if not np.isfinite(read.logprobs).all():
                raise Failed(f"prompt {index} got a log-probability that is not finite; the model needs float32")
        return [ids.tolist() for ids in answer.work.sequences], answer.results

    async def next(
        self, call: Call, prompts: Callable[[], list[list[int]]], size: Size, tokens: Sequence[int]
    ) -> np.ndarray:
        """Return the log-probabilities of tokens behind prompts of token ids, float32 [B, tokens]; as `read` else."""
        wanted = np.array(tokens, np.int64)
        self._check_numbers(size.sequences * len(wanted))
        answer = await self._ids("next", call, prompts, size, wanted)
        return np.stack(answer.results)

    async def _ids(
        self, kind: str, call: Call, prompts: Callable[[], list[list[int]]], size: Size, extra: Any, numbers: int = 0
    ) -> Answer:
        def work() -> Work:
            arrays = [np.array(ids, np.int32) for ids in prompts()]
            self._check_numbers(numbers * sum(map(len, arrays)))
            return Work(arrays, [extra] * len(arrays), Encoded([], Items(), 0, _rows_alone(arrays)))

        return await self._submit(kind, call, work, size)

    async def aside(self, call: Call, make: Callable[[], T], size: Size) -> T:
        """Return what `make` makes where the batcher tokenises, admitted as a request of this size is."""
        kind = KINDS[self.engine.task][0]
        answer = await self.batcher.ask(kind, lambda: Work([], [], make()), size, deadline=call.deadline)
        return answer.work.beside

    def _check_numbers(self, count: int) -> None:
        """TooLarge for an answer of more numbers than one request may have."""
        if count > self.max_numbers:
            raise TooLarge(
                f"the answer would hold {count:,} numbers and the most are {self.max_numbers:,}; ask for less at once"
            )

    async def _ask(
        self,
        kind: str,
        call: Call,
        records: Sequence[Record],
        size: Size,
        extras: Callable[[Any], list[Any]],
        encode: Callable[[Any, list[Any]], Items] = lambda engine, items: engine.encode(items),
        renamed: Callable[[str], str] = str,
    ) -> Answer:
        """Submit records: they are parsed and encoded where the batcher tokenises; texts that are too long are cut
        where the call asks for it. `renamed` lets errors name the request's own fields."""

        def work() -> Work:
            items = [self.engine.parse(record) for record in records]
            num_cut = 0
            try:
                sequences = encode(self.engine, items)
            except TooLong:
                if not call.truncate:
                    raise
                sequences = encode(self._cutting, items)
                num_cut = sum(self._is_too_long(encode, item) for item in items)
            arrays = _read_by_the_model(sequences)
            if kind == "states":
                self._check_numbers(sum(map(len, arrays)) * self.engine.config.get_text_config().hidden_size)
            size = self.engine.runner.vocab_size
            largest = max((int(ids.max()) for ids in arrays), default=0)
            if largest >= size:
                raise Failed(
                    f"the tokenizer yields token {largest} and the model embeds {size}: they don't fit together"
                )
            return Work(arrays, extras(sequences), Encoded(items, sequences, num_cut, _rows_alone(arrays)))

        try:
            return await self._submit(kind, call, work, size)
        except UserError as error:
            raise type(error)(renamed(str(error))) from error

    def _is_too_long(self, encode: Callable[[Any, list[Any]], Items], item: Any) -> bool:
        try:
            encode(self.engine, [item])
        except TooLong:
            return True
        return False

    async def _submit(self, kind: str, call: Call, work: Callable[[], Work], size: Size) -> Answer:
        answer = await self.batcher.ask(kind, work, size, salt=call.salt, deadline=call.deadline)
        call.timings, call.num_cut, call.rows = answer.timings, answer.work.beside.num_cut, answer.work.beside.rows
        return answer

    def _check_finite(self, rows: np.ndarray, names: Sequence[str]) -> None:
        wrong = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(wrong):
            raise Failed(f"{names[wrong[0]]} got an embedding that is not finite; the model needs float32")


def _without_key(message: str) -> str:
    """Return a message on a record that `_record` made in the words of the request, which has ids in the field."""
    return re.sub(r'^([\w.\[\]]+): "input_ids"', r"\1", message)


def _record(text: Text, name: str) -> Record:
    return Record(name, {"text": text} if isinstance(text, str) else {"input_ids": text})


def _lengths_of_pairs(query: Mapping[str, Any]) -> list[int]:
    """Return how many characters the model reads of a query with each document."""
    before = len(query["query"]) + len(query.get("instruction", ""))
    texts = [text if isinstance(text, str) else str(text.get("text", "")) for text in query["documents"]]
    return [before + len(text) for text in texts]


def _lengths_in(records: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Return the characters of questions' texts, the context once for each choice, and the lengths of arrays of ids."""
    characters: list[int] = []
    ids: list[int] = []
    for record in records:
        others = sum(len(value) for value in record.values() if isinstance(value, str))
        lists = [value for value in record.values() if isinstance(value, list)]
        choices = [others + len(text) for texts in lists for text in texts if isinstance(text, str)]
        numbers = [len(value) for value in lists if value and not isinstance(value[0], str)]
        characters += choices if choices or numbers else [others]
        ids += numbers
    return characters, ids


def size_of(call: Call, texts: Sequence[Text]) -> Size:
    """Estimate the size of texts that are read once each, and note their characters."""
    strings = [len(text) for text in texts if isinstance(text, str)]
    return _size_of(call, strings, [len(ids) for ids in texts if not isinstance(ids, str)])


def _size_of(call: Call, characters: Sequence[int], ids: Sequence[int] = ()) -> Size:
    call.characters = sum(characters)
    return Size.of_lengths(characters, ids)


def _read_by_the_model(sequences: Items) -> list[np.ndarray]:
    store, lengths = sequences.store, sequences.lengths.tolist()
    return [np.array(store[index][:length]) for index, length in enumerate(lengths)]


def _rows_alone(arrays: list[np.ndarray]) -> int:
    """Count the rows of a request folded by itself, which tell nothing of others' requests."""
    return Sharing(TokenStore.from_sequences(arrays)).num_rows if len(arrays) > 1 else sum(map(len, arrays))
