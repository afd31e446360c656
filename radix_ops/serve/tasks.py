"""What requests ask of the engine, as work for the batcher: encoded, submitted, and made into results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
from .refusals import Failed
from .work import Answer, Size, Timings, Work

Text = str | list[int]  # or its token ids
_REQUEST = "the request"
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

    def __init__(self, engine: Engine, batcher: Batcher):
        self.engine, self.batcher = engine, batcher
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
        return await self._ask(kind, call, records, _size_of(call, texts), extras, encode)

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
        texts = [text for query in queries for text in _pairs(query)]
        try:
            answer = await self._ask("logit", call, records, _size_of(call, texts), lambda s: [None] * len(s.store))
        except UserError as error:
            raise type(error)(str(error).replace(f"{_REQUEST}: documents[", f"{field}[")) from error
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

        answer = await self._ask("labels", call, records, _size_of(call, texts), places)
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
        texts = [text for record in records for text in _texts_in(record)]

        def extras(sequences: Any) -> list[Any]:
            found = []
            for item in range(len(sequences)):
                key = object()
                for context, choice in sequences[item]:
                    found.append(Chosen(key, len(context), int(choice[-1])))
            return found

        answer = await self._ask("choices", call, given, _size_of(call, texts), extras)
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

    async def read(self, call: Call, prompts: Sequence[list[int]], count: int) -> list[Read]:
        """Return the log-probabilities of prompts of token ids, and of the `count` likeliest tokens at each place."""
        arrays = [np.array(ids, np.int32) for ids in prompts]
        answer = await self._ids("logprobs", call, arrays, [count] * len(arrays))
        for index, read in enumerate(answer.results):
            if not np.isfinite(read.logprobs).all():
                raise Failed(f"prompt {index} got a log-probability that is not finite; the model needs float32")
        return answer.results

    async def next(self, call: Call, prompts: Sequence[list[int]], tokens: Sequence[int]) -> np.ndarray:
        """Return the log-probabilities of tokens behind prompts of token ids, float32 [B, tokens]."""
        wanted = np.array(tokens, np.int64)
        arrays = [np.array(ids, np.int32) for ids in prompts]
        answer = await self._ids("next", call, arrays, [wanted] * len(arrays))
        return np.stack(answer.results)

    async def _ids(self, kind: str, call: Call, arrays: list[np.ndarray], extras: list[Any]) -> Answer:
        size = Size(sum(map(len, arrays)), len(arrays))
        work = Work(arrays, extras, Encoded([], Items(), 0, _rows_alone(arrays)))
        return await self._submit(kind, call, lambda: work, size)

    async def _ask(
        self,
        kind: str,
        call: Call,
        records: Sequence[Record],
        size: Size,
        extras: Callable[[Any], list[Any]],
        encode: Callable[[Any, list[Any]], Items] = lambda engine, items: engine.encode(items),
    ) -> Answer:
        """Submit records: they are parsed and encoded where the batcher tokenises; texts that are too long are cut
        where the call asks for it."""

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
            size = self.engine.runner.vocab_size
            largest = max((int(ids.max()) for ids in arrays), default=0)
            if largest >= size:
                raise Failed(
                    f"the tokenizer yields token {largest} and the model embeds {size}: they don't fit together"
                )
            return Work(arrays, extras(sequences), Encoded(items, sequences, num_cut, _rows_alone(arrays)))

        return await self._submit(kind, call, work, size)

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


def _record(text: Text, name: str) -> Record:
    return Record(name, {"text": text} if isinstance(text, str) else {"input_ids": text})


def _pairs(query: Mapping[str, Any]) -> list[str]:
    """Return all that the model reads of a query, once for each document."""
    before = query["query"] + query.get("instruction", "")
    return [before + (text if isinstance(text, str) else str(text.get("text", ""))) for text in query["documents"]]


def _texts_in(record: Mapping[str, Any]) -> list[Text]:
    """Return the texts, or ids, of a question: its context once for each choice."""
    found: list[Text] = []
    lists = [value for value in record.values() if isinstance(value, list) and value]
    others = "".join(value for value in record.values() if isinstance(value, str))
    for values in lists:
        found += [
            others + value if isinstance(value, str) else value for value in values if isinstance(value, (str, list))
        ]
    return found or [others]


def _size_of(call: Call, texts: Sequence[Text]) -> Size:
    """Estimate the size of a request, and note its characters."""
    strings = [text for text in texts if isinstance(text, str)]
    call.characters = sum(map(len, strings))
    ids = [text for text in texts if not isinstance(text, str)]
    estimated = Size.of_texts(strings)
    return Size(estimated.tokens + sum(map(len, ids)), len(texts))


def _read_by_the_model(sequences: Items) -> list[np.ndarray]:
    store, lengths = sequences.store, sequences.lengths.tolist()
    return [np.array(store[index][:length]) for index, length in enumerate(lengths)]


def _rows_alone(arrays: list[np.ndarray]) -> int:
    """Count the rows of a request folded by itself, which tell nothing of others' requests."""
    return Sharing(TokenStore.from_sequences(arrays)).num_rows if len(arrays) > 1 else sum(map(len, arrays))
