"""POST /, which does the server's task, as TEI's clients or those of Hugging Face's inference API ask for it."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from fastapi import Body, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from ..engine import Classifier
from . import inputs, replies, scoring_routes, tei_routes
from .routing import Route, router
from .server import server_of
from .shapes import Unusable

routes = router(Route, "text-embeddings-inference")
B = TypeVar("B", bound=BaseModel)


@routes.post("/")
async def do_task(request: Request, body: Annotated[dict[str, Any], Body()]) -> Response:
    """Do what the server's task is: /embed, or /similarity for a source_sentence, /rerank, /predict or /choices. With
    "parameters" the request and its answer are those of Hugging Face's inference API."""
    server = server_of(request)
    server.check_serving()
    task, parameters = server.engine.task, body.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise Unusable("invalid", "parameters must be an object", "parameters")
    if task == "rerank":
        return await tei_routes.rerank(_valid(tei_routes.RerankRequest, body), request)
    if task == "score":
        return await scoring_routes.choices(_valid(scoring_routes.ChoicesRequest, body), request)
    if task == "classify":
        if parameters is None:
            return await tei_routes.predict(_valid(tei_routes.PredictRequest, body), request)
        given = {name: value for name, value in parameters.items() if value is not None}
        return await _classified(request, _valid(tei_routes.PredictRequest, {**given, **body}), parameters)
    if isinstance(body.get("inputs"), dict):
        return await tei_routes.similarity(_valid(tei_routes.SimilarityRequest, body), request)
    known = {name: value for name, value in (parameters or {}).items() if value is not None}
    return await tei_routes.embed(_valid(tei_routes.EmbedRequest, {**known, **body}), request)


def _valid(kind: type[B], body: dict[str, Any]) -> B:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


async def _classified(request: Request, body: tei_routes.PredictRequest, parameters: dict[str, Any]) -> Response:
    """Return labels as a pipeline of transformers does, a list of them for each input."""
    server = server_of(request)
    engine = server.engine
    assert isinstance(engine, Classifier)
    found = inputs.strings(body.inputs, "inputs", server.settings.max_inputs, takes_one=True)
    rows = inputs.Inputs([{"text": text} for text in found.values], found.names, found.is_one)
    function, top_k = parameters.get("function_to_apply"), parameters.get("top_k")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise Unusable("invalid", f"top_k must be a whole number from 1, got {top_k!r}", "parameters")
    own = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid", "regression": "none"}
    if function not in (None, "none", own[engine.problem_type]):
        raise Unusable(
            "invalid", f"function_to_apply must be none or the model's own, {own[engine.problem_type]}", "parameters"
        )
    call = tei_routes.call_of(server, request, body)
    predictions = await tei_routes.predictions_of(server, call, rows, raw=function == "none")
    return replies.answer(request, call, [row[:top_k] for row in predictions])
