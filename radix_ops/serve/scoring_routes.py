"""The routes of vLLM and SGLang for scores, labels and poolings, and our own for choices."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Request
from pydantic import WithJsonSchema
from starlette.responses import Response

from ..engine import Classifier
from . import inputs, replies, tokens
from .inputs import Fields, Salt, Strings, Texts
from .openai_routes import Truncating
from .routing import OpenAIRoute, Route, router
from .server import Server, server_of
from .shapes import Unusable
from .tasks import Text
from .work import Size

routes = router(OpenAIRoute, "vLLM and SGLang")
own = router(Route, "radix_ops")
Record = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]}),
]


class ScoreRequest(Truncating):
    text_1: Strings = None
    text_2: Strings = None
    queries: Strings = None
    documents: Strings = None
    items: Strings = None


class ClassifyRequest(Truncating):
    input: Texts


class PoolingRequest(Truncating):
    input: Texts
    task: Literal["embed", "token_embed", "classify"] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool | None = None


class LabelsRequest(Fields):
    query: Texts
    items: Texts
    label_token_ids: inputs.Ids
    apply_softmax: bool = False
    item_first: bool = False
    model: str | None = None
    cache_salt: Salt = None


class ChoicesRequest(Fields):
    items: Record
    truncate: bool | None = None
    cache_salt: Salt = None


@routes.post("/score")
async def score(body: ScoreRequest, request: Request) -> Response:
    """Return how relevant each text of the second field is to the first, or the cosine of their embeddings: one to
    all, or pair by pair."""
    server = server_of(request)
    server.check_task(request, "rerank", "embed")
    server.check_model(body.model)
    call = server.call(request, body.cuts, body.cache_salt)
    first, second = _sides(body, server.settings.max_inputs)
    one = len(first.values) == 1
    if server.engine.task == "rerank":
        queries = (
            [{"query": first.values[0], "documents": second.values}]
            if one
            else [{"query": a, "documents": [b]} for a, b in zip(first.values, second.values, strict=True)]
        )
        scores, _, count = await server.tasks.relevance(call, queries, second.names[0].partition("[")[0])
    else:
        pooled, counts = await server.tasks.embed(call, [*first.values, *second.values], [*first.names, *second.names])
        rows, count = server.tasks.embeddings(pooled, True), sum(counts)
        scores = (rows[: len(first.values)] * rows[len(first.values) :]).sum(1)
    data = [{"index": index, "object": "score", "score": found} for index, found in enumerate(scores)]
    content = {**replies.head("list", "score", server.name), "data": data, "usage": replies.usage(count)}
    return replies.answer(request, call, content)


def _sides(body: ScoreRequest, most: int) -> tuple[inputs.Inputs, inputs.Inputs]:
    pairs = [("text_1", "text_2"), ("queries", "documents"), ("queries", "items")]
    given = [pair for pair in pairs if all(getattr(body, name) is not None for name in pair)]
    if len(given) != 1:
        raise Unusable("invalid", "the body must have text_1 and text_2, or queries and documents or items")
    first, second = (inputs.strings(getattr(body, name), name, most, takes_one=True) for name in given[0])
    if len(first.values) not in (1, len(second.values)):
        raise Unusable(
            "invalid",
            f"{given[0][0]} has {len(first.values)} texts and {given[0][1]} {len(second.values)}; the first must have "
            "one, or as many as the second",
            given[0][0],
        )
    return first, second


@routes.post("/classify")
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """Return the likeliest label of each input, and the scores of all in the labels' order."""
    server = server_of(request)
    server.check_task(request, "classify")
    server.check_model(body.model)
    call = server.call(request, body.cuts, body.cache_salt)
    scores, counts = await _labels(server, call, body.input)
    labels: list[str] = server.engine.labels  # type: ignore[attr-defined]
    data = [
        {
            "index": index, "label": labels[int(row.argmax())], "probs": row.astype(np.float32),
            "num_classes": len(labels),
        }
        for index, row in enumerate(scores)
    ]  # fmt: skip
    content = {**replies.head("list", "classify", server.name), "data": data, "usage": replies.usage(sum(counts))}
    return replies.answer(request, call, content)


async def _labels(server: Server, call: Any, given: Any) -> tuple[list[np.ndarray], list[int]]:
    found = inputs.texts(given, "input", server.settings.max_inputs)
    rows: list[Mapping[str, Any]] = [
        {"text": text} if isinstance(text, str) else {"input_ids": text} for text in found.values
    ]
    return await server.tasks.labels(call, rows, found.names)


@routes.post("/pooling")
async def pooling(body: PoolingRequest, request: Request) -> Response:
    """Return what the model makes of each input: its embedding, its labels' scores, or with the task token_embed the
    hidden states of all its tokens."""
    server = server_of(request)
    server.check_task(request, "embed", "classify")
    server.check_model(body.model)
    task = body.task or server.engine.task
    if (task == "classify") != isinstance(server.engine, Classifier):
        raise Unusable("invalid", f"task is {task}, and the server's is {server.engine.task}", "task")
    if task != "embed" and (body.dimensions is not None or body.normalize):
        raise Unusable("invalid", f"dimensions and normalize are of the task embed, and this one is {task}")
    call = server.call(request, body.cuts, body.cache_salt)
    rows: Any
    if task == "classify":
        scores, counts = await _labels(server, call, body.input)
        rows = [row.astype(np.float32) for row in scores]
    else:
        found = inputs.texts(body.input, "input", server.settings.max_inputs)
        if task == "token_embed":
            rows = await server.tasks.states(call, found.values, found.names)
            counts = [len(states) for states in rows]
        else:
            server.tasks.check_dim(body.dimensions)
            pooled, counts = await server.tasks.embed(call, found.values, found.names)
            rows = server.tasks.embeddings(pooled, body.normalize, body.dimensions)
    shown = [replies.vector(row, body.encoding_format) for row in rows]
    data = [{"index": index, "object": "pooling", "data": row} for index, row in enumerate(shown)]
    content = {**replies.head("list", "pool", server.name), "data": data, "usage": replies.usage(sum(counts))}
    return replies.answer(request, call, content)


@routes.post("/v1/score")
async def label_tokens(body: LabelsRequest, request: Request) -> Response:
    """Return the probability of each label's token behind query and item; with apply_softmax against each other."""
    server = server_of(request)
    server.check_task(request, "score")
    server.check_model(body.model)
    labels = inputs.ids(body.label_token_ids, "label_token_ids", server.vocab_size)
    if not labels:
        raise Unusable("empty", "label_token_ids is an empty array; it must hold a token at least", "label_token_ids")
    call = server.call(request, salt=body.cache_salt)
    query, items = _query_and_items(server, body)
    parts = [(item, query) if body.item_first else (query, item) for item in items.values]
    make = functools.partial(_prompts, server, parts, items.names)
    given = [len(query) + len(item) for item in items.values]
    size = Size.of_lengths(given) if isinstance(query, str) else Size.of_lengths((), given)
    call.characters = sum(given) if isinstance(query, str) else 0
    logprobs = (await server.tasks.next(call, make, size, labels)).astype(np.float64)
    scores = np.exp(logprobs)
    if body.apply_softmax:
        scores = np.exp(logprobs - np.logaddexp.reduce(logprobs, axis=1, keepdims=True))
    content = {
        "object": "scoring", "scores": scores, "model": server.name, "usage": replies.usage(call.timings.tokens, 0),
    }  # fmt: skip
    return replies.answer(request, call, content)


def _query_and_items(server: Server, body: LabelsRequest) -> tuple[Text, inputs.Inputs]:
    query = inputs.texts(body.query, "query", 1)
    items = inputs.texts(body.items, "items", server.settings.max_inputs)
    if not query.is_one or any(type(item) is not type(query.values[0]) for item in items.values):
        raise Unusable("invalid", "query and items must all be strings, or all be arrays of token ids", "items")
    return query.values[0], items


def _prompts(server: Server, parts: list[tuple[Any, Any]], names: list[str]) -> list[list[int]]:
    """Return the token ids of the query with each item; texts are joined before they are tokenised."""
    prompts: list[Any] = [first + second for first, second in parts]
    if isinstance(parts[0][0], str):
        prompts = tokens.encoded(server.engine.tokenizer, prompts)
    else:
        for prompt, name in zip(prompts, names, strict=True):
            inputs.ids(prompt, f"query and {name}", server.vocab_size)
    most = server.max_length()
    for prompt, name in zip(prompts, names, strict=True):
        if not prompt:
            raise Unusable("empty", f"query and {name} hold no tokens", "items")
        if most is not None and len(prompt) > most:
            raise Unusable("too_long", f"query and {name} have {len(prompt)} tokens and the model reads at most {most}")
    return prompts


@own.post("/choices")
async def choices(body: ChoicesRequest, request: Request) -> Response:
    """Return the log-probability of each choice of each question, or of whole texts: items are the lines that
    `radix-ops score` reads, and so are the results."""
    server = server_of(request)
    server.check_task(request, "score")
    is_one = isinstance(body.items, dict)
    given = [body.items] if is_one else body.items
    found = inputs.listed(given, "items", server.settings.max_inputs, "an object, or an array of objects")
    for each, name in zip(found.values, found.names, strict=True):
        if not isinstance(each, dict):
            raise Unusable("invalid", f'{name} must be an object like {{"context": ..., "choices": [...]}}', "items")
    call = server.call(request, body.truncate, body.cache_salt)
    results = await server.tasks.choices(call, found.values, found.names)
    return replies.answer(request, call, {"results": results, "model": server.name})
