"""The rerank routes of Cohere and Jina; every document goes through the model's own template."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import numpy as np
from fastapi import Request
from pydantic import WithJsonSchema
from starlette.responses import Response

from . import inputs, replies
from .inputs import Documents, Fields, Salt
from .routing import CohereRoute, router
from .server import server_of
from .shapes import Unusable

routes = router(CohereRoute, "Cohere and Jina")
RankFields = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]})
]


class RerankRequest(Fields):
    query: str
    documents: Documents
    model: str | None = None
    top_n: int | None = None
    return_documents: bool = False
    truncate: bool | None = None
    truncation: bool | None = None  # Jina's name
    instruction: str | None = None
    max_chunks_per_doc: int | None = None
    max_tokens_per_doc: int | None = None
    rank_fields: RankFields = None
    cache_salt: Salt = None


@routes.post("/v1/rerank")
@routes.post("/v2/rerank")
async def rerank(body: RerankRequest, request: Request) -> Response:
    """Return the relevance of documents to the query, the best first."""
    server = server_of(request)
    server.check_task(request, "rerank")
    server.check_model(body.model)
    documents = inputs.listed(body.documents, "documents", server.settings.max_inputs, "an array of strings")
    texts = [_text_of(each, name) for each, name in zip(documents.values, documents.names, strict=True)]
    _check_options(body)
    query: dict[str, Any] = {"query": body.query, "documents": texts}
    query |= {} if body.instruction is None else {"instruction": body.instruction}
    call = server.call(request, bool(body.truncate or body.truncation), body.cache_salt)
    scores, _, count = await server.tasks.relevance(call, [query])
    results: list[dict[str, Any]] = [
        {"index": index, "relevance_score": scores[index]}
        for index in np.argsort(-scores, kind="stable").tolist()[: body.top_n]
    ]
    if body.return_documents:
        results = [result | {"document": {"text": texts[result["index"]]}} for result in results]
    version = request.url.path.split("/")[-2].removeprefix("v")
    content = {
        "id": str(uuid.uuid4()), "object": "list", "model": server.name, "results": results,
        "usage": replies.usage(count),
        "meta": {"api_version": {"version": version}, "billed_units": {"search_units": 1}},
    }  # fmt: skip
    return replies.answer(request, call, content)


def _text_of(document: Any, name: str) -> str:
    text = document.get("text") if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise Unusable("invalid", f'{name} must be a string, or an object with a string "text"', "documents")
    return text


def _check_options(body: RerankRequest) -> None:
    if body.top_n is not None and body.top_n < 1:
        raise Unusable("invalid", f"top_n must be a whole number from 1, got {body.top_n}", "top_n")
    for name, plain in (("max_chunks_per_doc", None), ("max_tokens_per_doc", None), ("rank_fields", ["text"])):
        value = getattr(body, name)
        if value not in (None, plain):
            raise Unusable(
                "invalid",
                f'{name} is {value!r:.40}; documents are read whole, or with "truncate": true lose what does not fit',
                name,
            )
