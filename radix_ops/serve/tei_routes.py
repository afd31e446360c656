"""The routes of text-embeddings-inference: embeddings, rankings, predictions, tokens."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Request
from pydantic import BeforeValidator
from starlette.responses import Response

from ..engine import Embedder
from . import inputs, replies, tokens
from .inputs import Fields, ListOfStrings, Salt, Strings, Texts, TextsOrPairs
from .routing import Route, router
from .server import Server, server_of
from .shapes import Unusable
from .tasks import Call, size_of

routes = router(Route, "text-embeddings-inference")
Direction = Annotated[
    Literal["Left", "Right"], BeforeValidator(lambda value: value.capitalize() if isinstance(value, str) else value)
]


class Truncating(Fields):
    truncate: bool | None = None
    truncation_direction: Direction = "Right"
    cache_salt: Salt = None


class EmbedAllRequest(Truncating):
    inputs: Texts
    prompt_name: str | None = None


class EmbedRequest(EmbedAllRequest):
    normalize: bool = True
    dimensions: int | None = None


class RerankRequest(Truncating):
    query: str
    texts: ListOfStrings
    raw_scores: bool = False
    return_text: bool = False
    instruction: str | None = None


class PredictRequest(Truncating):
    inputs: TextsOrPairs
    raw_scores: bool = False


class SimilarityInput(Fields):
    source_sentence: str
    sentences: ListOfStrings


class SimilarityParameters(Truncating):
    prompt_name: str | None = None


class SimilarityRequest(Truncating):
    inputs: SimilarityInput
    parameters: SimilarityParameters | None = None


class TokenizeRequest(Fields):
    inputs: Strings
    add_special_tokens: bool = True
    prompt_name: str | None = None


class DecodeRequest(Fields):
    ids: inputs.ListsOfIds
    skip_special_tokens: bool = True


def call_of(server: Server, request: Request, body: Truncating) -> Call:
    if body.truncate and body.truncation_direction == "Left":
        raise Unusable(
            "invalid", "truncation_direction is Left; texts lose their end, Right, or nothing", "truncation_direction"
        )
    return server.call(request, body.truncate, body.cache_salt)


def check_prompt_name(server: Server, name: str | None) -> None:
    """Unusable for a prompt that the model's folder doesn't have, in the words that TEI's clients read."""
    prompts = server.engine.prompts if isinstance(server.engine, Embedder) else {}
    if name is not None and name not in prompts:
        known = ", ".join(f'"{prompt}"' for prompt in prompts)
        raise Unusable(
            "prompt",
            f"prompt_name {inputs.shown(name)} is none of the model's. Available prompts: [{known}]",
            "prompt_name",
        )


@routes.post("/embed")
async def embed(body: EmbedRequest, request: Request) -> Response:
    """Return an embedding for each input, of length 1 unless `normalize` is false."""
    server = server_of(request)
    server.check_task(request, "embed")
    found, call = inputs.texts(body.inputs, "inputs", server.settings.max_inputs), call_of(server, request, body)
    check_prompt_name(server, body.prompt_name)
    server.tasks.check_dim(body.dimensions)
    pooled, _ = await server.tasks.embed(call, found.values, found.names, body.prompt_name)
    return replies.answer(request, call, server.tasks.embeddings(pooled, body.normalize, body.dimensions))


@routes.post("/embed_all")
async def embed_all(body: EmbedAllRequest, request: Request) -> Response:
    """Return the hidden states of all tokens of each input, those of its special tokens and its prompt included."""
    server = server_of(request)
    server.check_task(request, "embed")
    found, call = inputs.texts(body.inputs, "inputs", server.settings.max_inputs), call_of(server, request, body)
    check_prompt_name(server, body.prompt_name)
    return replies.answer(request, call, await server.tasks.states(call, found.values, found.names, body.prompt_name))


@routes.post("/similarity")
async def similarity(body: SimilarityRequest, request: Request) -> Response:
    """Return the cosine of each sentence's embedding and the source's."""
    server = server_of(request)
    server.check_task(request, "embed")
    given, options = body.inputs, body.parameters or SimilarityParameters()
    found = inputs.strings(given.sentences, "inputs.sentences", server.settings.max_inputs)
    call = call_of(server, request, body.model_copy(update=options.model_dump(exclude_unset=True)))
    check_prompt_name(server, options.prompt_name)
    texts, names = [given.source_sentence, *found.values], ["inputs.source_sentence", *found.names]
    pooled, _ = await server.tasks.embed(call, texts, names, options.prompt_name)
    rows = server.tasks.embeddings(pooled, True)
    return replies.answer(request, call, rows[1:] @ rows[0])


@routes.post("/rerank")
async def rerank(body: RerankRequest, request: Request) -> Response:
    """Return the texts' scores for the query, the best first."""
    server = server_of(request)
    server.check_task(request, "rerank")
    found, call = inputs.strings(body.texts, "texts", server.settings.max_inputs), call_of(server, request, body)
    query = {"query": body.query, "documents": found.values}
    query |= {} if body.instruction is None else {"instruction": body.instruction}
    scores, logits, _ = await server.tasks.relevance(call, [query], "texts")
    shown = logits if body.raw_scores else scores
    ranks = [{"index": index, "score": shown[index]} for index in np.argsort(-scores, kind="stable").tolist()]
    if body.return_text:
        ranks = [rank | {"text": found.values[rank["index"]]} for rank in ranks]
    return replies.answer(request, call, ranks)


@routes.post("/predict")
async def predict(body: PredictRequest, request: Request) -> Response:
    """Return the labels of each input with their scores, the best first."""
    server = server_of(request)
    server.check_task(request, "classify")
    found = inputs.texts_or_pairs(body.inputs, "inputs", server.settings.max_inputs)
    call = call_of(server, request, body)
    predictions = await predictions_of(server, call, found, body.raw_scores)
    return replies.answer(request, call, inputs.one_or_all(predictions, found.is_one))


async def predictions_of(server: Server, call: Call, found: inputs.Inputs, raw: bool = False) -> list[list[dict]]:
    labels: list[str] = server.engine.labels  # type: ignore[attr-defined]
    scores, _ = await server.tasks.labels(call, found.values, found.names, raw)
    return [
        [{"score": np.float32(row[i]), "label": labels[i]} for i in np.argsort(-row, kind="stable").tolist()]
        for row in scores
    ]


@routes.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Return the tokens of each input, with the places of their characters."""
    server = server_of(request)
    server.check_serving()
    found = inputs.strings(body.inputs, "inputs", server.settings.max_inputs, takes_one=True)
    check_prompt_name(server, body.prompt_name)
    prompt = server.engine.prompts[body.prompt_name] if body.prompt_name is not None else ""  # type: ignore[attr-defined]
    texts = [prompt + text for text in found.values]
    call = server.call(request)
    make = functools.partial(tokens.tokenized, server.engine.tokenizer, texts, body.add_special_tokens)
    return replies.json(await server.tasks.aside(call, make, size_of(call, texts)))


@routes.post("/decode")
async def decode(body: DecodeRequest, request: Request) -> Response:
    """Return the text of each array of token ids."""
    server = server_of(request)
    server.check_serving()
    given = body.ids if isinstance(body.ids, list) and body.ids and isinstance(body.ids[0], list) else [body.ids]
    found = inputs.listed(given, "ids", server.settings.max_inputs, "an array of token ids, or of arrays of them")
    size = len(server.engine.tokenizer)
    ids = [inputs.ids(each, name, size) for each, name in zip(found.values, found.names, strict=True)]
    call = server.call(request)
    make = functools.partial(tokens.decoded, server.engine.tokenizer, ids, body.skip_special_tokens)
    return replies.json(await server.tasks.aside(call, make, size_of(call, ids)))


@routes.get("/info")
async def info(request: Request) -> Response:
    """Return what TEI says of itself: the model, its kind and the limits."""
    server = server_of(request)
    server.check_serving()
    return replies.json(info_of(server))


def info_of(server: Server) -> dict[str, Any]:
    from .. import __version__

    engine = server.engine
    kinds: dict[str, dict[str, Any]] = {
        "embed": {"embedding": {"pooling": _pooling_of(engine)}},
        "rerank": {"reranker": {"id2label": {"0": "relevance"}, "label2id": {"relevance": 0}}},
        "classify": {"classifier": _labels_of(engine)},
        "score": {"scorer": {}},
    }
    parameter = next(engine.model.parameters())
    return {
        "model_id": server.name, "model_sha": None, "model_dtype": str(parameter.dtype).removeprefix("torch."),
        "served_model_name": server.name, "model_type": kinds[engine.task],
        "max_concurrent_requests": server.queue.max_requests, "max_input_length": server.max_length(),
        "max_batch_tokens": server.queue.max_tokens, "max_batch_requests": None,
        "max_client_batch_size": server.settings.max_inputs, "auto_truncate": False, "tokenization_workers": None,
        "version": __version__, "sha": None, "docker_label": None,
    }  # fmt: skip


def _pooling_of(engine: Any) -> str | None:
    if not isinstance(engine, Embedder):
        return None
    return {"last": "last_token"}.get("+".join(engine.poolings), "+".join(engine.poolings))


def _labels_of(engine: Any) -> dict[str, Any]:
    labels = getattr(engine, "labels", [])
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }
