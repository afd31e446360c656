"""`Reranker` orders documents by relevance to a query."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from . import reranking
from ._engine import Engine, Layout, OnProgress, iterator_of
from .arguments import DTypeName, check_count, check_flags
from .batches import Compute
from .cross_encoders import READINGS, CrossEncoder, chat_of, check_head, find_cross_encoder, template_of
from .errors import UserError, options_as_arguments
from .inputs import Record
from .items import Items
from .loading import has_tokenizer, max_length_of
from .messages import Chat
from .relevance import Judgements, Relevance
from .reranking import Query
from .templates import Template

_SHAPE = '{"query": "...", "documents": ["...", "..."]}'
Document = str | Mapping[str, Any]


class Reranker(Engine[Query]):
    """Scores documents by their relevance to a query; query and what stands before it are computed once for all.

    A language model reads query and document in a template and answers yes or no: the score is P(yes) against P(no) as
    its next token. A model with a classification head of one label (a cross-encoder) reads them as the pair that its
    tokenizer makes, or as its tokenizer's chat template renders them; its score is the sigmoid of its logit, or what a
    folder that sentence-transformers saved says.

    `model`, `tokenizer`, `device`, `dtype`, `token_budget`, `layout`, `plain`, `trust_remote_code` and `lazy` are those
    of `Scorer`.

    Args:
        template: "qwen3-reranker", the default for Qwen3 language models; a `Template`, or a JSON file of its fields
            (docs/engine.md); of a cross-encoder also "pairs" or "chat".
        max_length: tokens of a query with its document at most, special tokens included. By default as the model and
            its tokenizer say.
        truncate_right: cut documents that are too long at their end; without it they are errors.
        top_k: what a result says of documents beside their scores is of so many of the best; of all by default.
        return_documents: results hold the documents' texts, too.

    Threads may share it: calls take turns.

    Raises UserError, a ValueError, as `Scorer` does, and for a language model that has no template.
    """

    task = "rerank"

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        *,
        template: str | os.PathLike[str] | Template | None = None,
        max_length: int | None = None,
        truncate_right: bool = False,
        top_k: int | None = None,
        return_documents: bool = False,
        device: str | torch.device | None = None,
        dtype: DTypeName | torch.dtype | None = None,
        token_budget: int | None = None,
        layout: Layout = "auto",
        plain: bool = False,
        trust_remote_code: bool = False,
        lazy: bool = False,
    ):
        with options_as_arguments():
            check_count("max_length", max_length)
            check_count("top_k", top_k)
            check_flags(truncate_right=truncate_right, return_documents=return_documents, lazy=lazy)
            if template is not None and not isinstance(template, (str, os.PathLike, Template)):
                raise UserError(f"template must be a name, a file or a Template, got {template!r}")
            template = os.fspath(template) if isinstance(template, os.PathLike) else template
            super().__init__(
                model, tokenizer, device=device, dtype=dtype, token_budget=token_budget, layout=layout, plain=plain,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            loaded = None if self._model is None else type(self._model).__name__
            encoder = find_cross_encoder(self.name, self.config, loaded)
            self._classifies = encoder is not None and encoder.classifies
            if self._classifies:
                check_head(self.name, self.config)
            self.template = template_of(self.name, self.config, template, encoder)
            self.truncate_right = truncate_right
            self.top_k, self.return_documents = top_k and int(top_k), bool(return_documents)
            self._encoder = encoder or CrossEncoder(False)
            self._asks = self.template is not None and not self._classifies
            self._activation = "sigmoid" if self._asks else self._encoder.activation
            self._prompt = self._encoder.prompt if self.template is None else ""
            self._reading = template if template in READINGS else None
            self._given_length = max_length
            self._finish(lazy)

    @functools.cached_property
    def _answers(self) -> tuple[int, int | None] | None:
        """The tokens whose logits count; None for a classification head."""
        if not self._asks:
            return self._encoder.answers
        assert self.template is not None
        if self._tokenizer is None and not has_tokenizer(self._source):
            return self.template.answer_ids(self._limits.vocab_size)
        return self.template.token_ids(self.tokenizer)

    @functools.cached_property
    def _chat(self) -> Chat | None:
        """The conversations that pairs are rendered as; None where they are none."""
        if self.template is not None:
            return None
        return chat_of(self.name, self._encoder, self._reading, self.tokenizer, self.config)

    @functools.cached_property
    def _max_length(self) -> int | None:
        return max_length_of(self._given_length, self.config, self.tokenizer, self._encoder.max_length)

    def _cut(self) -> None:
        self.truncate_right = True

    def _check_reading(self) -> None:
        assert (self._answers, self._chat, self._max_length) is not None

    @property
    def auto_class(self) -> str:
        return "AutoModelForSequenceClassification" if self._classifies else "AutoModelForCausalLM"

    @property
    def identity(self) -> tuple:
        template = self.template and dataclasses.astuple(self.template)
        return (template, self._answers, self._activation, self.top_k, self.return_documents)

    def rank(
        self,
        query: str,
        documents: Sequence[Document],
        *,
        top_k: int | None = None,
        instruction: str | None = None,
        return_documents: bool = False,
    ) -> list[dict[str, Any]]:
        """Rank documents by their relevance to a query, the best first, as CrossEncoder.rank of sentence-transformers.

        Args:
            query: a string.
            documents: strings, or objects as `score` takes them.
            top_k: keep so many of the best; by default as many as the engine's own `top_k`.
            instruction: what the template says of the task, where it has a place for that.
            return_documents: give each document's text, too.

        Returns a dict for each document, the best first and equal ones in their order: "corpus_id", its index, "score",
        a float, "id" where the documents have ids, and "text" where asked for. Raises UserError as `score` does.
        """
        with options_as_arguments():
            check_count("top_k", top_k)
            check_flags(return_documents=return_documents)
            listed = iterator_of(documents, "documents")
            if listed is None:
                raise UserError(f"documents must be a list of strings, got {type(documents).__name__}")
            fields = {"query": query, "documents": list(listed)}
            fields |= {} if instruction is None else {"instruction": instruction}
            parsed = self.parse(Record("rank", fields))
        (found,) = self._results([parsed], None)
        ranked = []
        for index in reranking.order_of(np.array(found["scores"]))[: top_k or self.top_k]:
            entry: dict[str, Any] = {"corpus_id": index, "score": found["scores"][index]}
            if parsed.ids:
                entry["id"] = parsed.ids[index]
            if return_documents or self.return_documents:
                entry["text"] = parsed.documents[index]
            ranked.append(entry)
        return ranked

    def score(
        self, queries: Iterable[Mapping[str, Any]], *, on_progress: OnProgress | None = None
    ) -> list[dict[str, Any]]:
        """Score the documents of all queries, planned together.

        Args:
            queries: an iterable of {"query": str, "documents": [...]}, perhaps with an "instruction". A document is a
                string, or an object {"text": str} perhaps with an "id" and a "title", which stands before the text.
                Other keys are copied to the result. Or rows of the hub with a query and texts (docs/data.md), or token
                ids: {"input_ids": [[int, ...], ...]}, the whole prompt of each document.
            on_progress: called with (tokens that are done, all tokens) after each batch.

        Returns a dict for each query, in order: its other keys, then "scores" of its documents, from 0 to 1 but for a
        cross-encoder whose folder says otherwise, and of the `top_k` best documents, the best first, "order", their
        indices, "ids" where they have some, and "texts" where the engine returns documents.

        Raises UserError, before the model runs, for a query that can't be used: it names the index, what is there, what
        is allowed and the remedy; after that for a score that is not finite. OutOfMemory where one document with its
        query does not fit into the device's memory.
        """
        with options_as_arguments():
            parsed = list(self._parsed(queries, "queries", _SHAPE))
        return self._results(parsed, on_progress)

    def stream(
        self, queries: Iterable[Mapping[str, Any]], *, window: int = 1024, on_progress: OnProgress | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield what `score` returns, query by query in order, as the queries come.

        window: queries that are checked and planned together. The more, the more they share; memory holds so many.
        `on_progress` is told of each window by itself, and errors come at a query's window.
        """
        return self._stream(self._parsed(queries, "queries", _SHAPE), window, on_progress)

    def evaluate(
        self,
        queries: Iterable[Mapping[str, Any]],
        judgements: Judgements | None = None,
        *,
        on_progress: OnProgress | None = None,
    ) -> dict[str, float]:
        """Score the documents of all queries, and measure the rankings by ir-measures, as trec_eval computes them.

        Args:
            queries: as `score` takes them. Each has a "relevance", a whole number for each document, above 0 for a
                relevant one; or, with `judgements`, a "query_id", and an "id" for each document.
            judgements: the relevance of documents, {query id: {document id: a whole number}}.
            on_progress: called with (tokens that are done, all tokens) after each batch.

        Returns the means of "nDCG@10", "RR" (the reciprocal rank, whose mean is MRR) and "R@10" (recall) over all
        queries of the judgements, those that aren't among `queries` too, or over the queries with a relevance. Raises
        UserError as `score` does, and where nothing is judged.
        """
        with options_as_arguments():
            relevance, parsed = Relevance(judgements), []
            for query in self._parsed(queries, "queries", _SHAPE):
                relevance.check(query)
                parsed.append(query)
            if relevance.num_judged == relevance.num_absent:
                raise UserError(
                    'no query has a "relevance", a number for each document' if judgements is None
                    else "no query is judged: none of the judgements' ids is a query's \"query_id\""
                )  # fmt: skip
        for query, found in zip(parsed, self._results(parsed, on_progress), strict=True):
            relevance.add(query, found["scores"])
        return relevance.measures()

    def _parse(self, record: Record) -> Query:
        query = reranking.parse_query(record, ("texts",) if self.return_documents else ())
        return reranking.check_instruction(query, self.template)

    def _encode_items(self, items: Iterable[Query]) -> Items:
        return reranking.encode(
            items, self.tokenizer, self.template, self._max_length, self.truncate_right, self._chat, self._prompt
        )

    def _compute(self, items: Items) -> Compute:
        return reranking.scorer(self.runner, self._answers, self._activation)

    def _result(self, item: Query, encoded: list, *numbers: np.ndarray) -> dict[str, Any]:
        (scores,) = numbers or (np.empty(0, np.float32),)
        return reranking.result(item, scores, self.top_k, self.return_documents)

    def _pad_token_id(self) -> int:
        return check_head(self.name, self.config) if self._classifies else 0
