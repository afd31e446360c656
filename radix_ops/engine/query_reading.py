"""The way from queries with documents to token sequences as `Reranker` goes it, without the model's weights."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from . import reranking
from .cross_encoders import READINGS, CrossEncoder, chat_of, check_head, find_cross_encoder, template_of
from .errors import UserError
from .inputs import Record
from .items import Items
from .loading import load_config
from .messages import Chat
from .reranking import Query
from .templates import TEMPLATES, Template, find_template


class QueryReading:
    """What a template's name, or a model's, says of reading queries; the model's folder is asked by the first query.

    Args:
        template: a name or file of `find_template`, "pairs" or "chat"; by default as the model reads queries.
        model: a folder or hub id.
    """

    def __init__(self, template: str | None = None, model: str | None = None, trust_remote_code: bool = False):
        self._reading = template if template in READINGS else None
        self._given = None if template is None or self._reading else find_template(template)
        self._model, self._trust = model, trust_remote_code

    @functools.cached_property
    def _config(self) -> Any:
        assert self._model is not None
        return load_config(self._model, trust_remote_code=self._trust)

    @functools.cached_property
    def _encoder(self) -> CrossEncoder | None:
        """What the model's folder says of pairs; None for a language model, and without a model."""
        found = None if self._model is None else find_cross_encoder(self._model, self._config)
        if found is not None and found.classifies:
            check_head(str(self._model), self._config)
        return found

    @functools.cached_property
    def _template(self) -> Template | None:
        if self._given is not None or self._reading == "pairs":
            return self._given
        return template_of(str(self._model), self._config, self._reading, self._encoder)

    def _chat(self, tokenizer: Any) -> Chat | None:
        if self._encoder is None or self._reading == "pairs":
            return None
        return chat_of(str(self._model), self._encoder, self._reading, tokenizer, self._config)

    def parse(self, record: Record) -> Query:
        """Return a record's query. UserError for one that can't be used, and where nothing says how it is read."""
        query = reranking.parse_query(record)
        if self._model is None and self._given is None and self._reading != "pairs":
            raise UserError(
                f"{record.where} holds a query and documents: --template must say how a model reads them, "
                f"{', '.join(TEMPLATES)} or a JSON file, or pairs for the pairs of a cross-encoder; or --model, as its "
                "folder says"
            )
        return reranking.check_instruction(query, self._template)

    def encode(self, queries: Iterable[Query], tokenizer: Any) -> Items:
        """Return the token sequences of queries, each with each of its documents, none cut."""
        template, prompt, chat = self._template, "", None
        if template is None and self._encoder is not None:
            prompt, chat = self._encoder.prompt, self._chat(tokenizer)
        return reranking.encode(queries, tokenizer, template, None, False, chat, prompt)
