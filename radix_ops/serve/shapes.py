"""The shapes in which families of clients read errors: TEI's, which is ours too, OpenAI's and Cohere's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ..engine.errors import TooLong, UserError
from .refusals import Expired, Failed, NotServing, Overloaded, Refused, TooLarge


class _Kind(NamedTuple):
    """How an error of one kind is answered: TEI's status and type, and OpenAI's status, type and code."""

    tei_status: int
    tei_type: str
    status: int
    type: str
    code: str | None = None


_INVALID = "invalid_request_error"
_KINDS = {
    "malformed": _Kind(400, "Validation", 400, _INVALID),  # no JSON
    "invalid": _Kind(422, "Validation", 400, _INVALID),  # fields, or texts, that can't be used
    "empty": _Kind(400, "Empty", 400, _INVALID),
    "prompt": _Kind(422, "Tokenizer", 400, _INVALID),
    "too_long": _Kind(413, "Validation", 400, _INVALID, "context_length_exceeded"),
    "too_many": _Kind(413, "Validation", 400, _INVALID),
    "too_large": _Kind(413, "Validation", 413, _INVALID, "request_too_large"),
    "media": _Kind(415, "Validation", 415, _INVALID),
    "unauthorized": _Kind(401, "Unauthorized", 401, "authentication_error", "invalid_api_key"),
    "no_route": _Kind(404, "NotFound", 404, _INVALID, "unknown_url"),
    "no_model": _Kind(404, "NotFound", 404, _INVALID, "model_not_found"),
    "method": _Kind(405, "Validation", 405, _INVALID),
    "overloaded": _Kind(429, "Overloaded", 429, "rate_limit_error", "rate_limit_exceeded"),
    "unavailable": _Kind(503, "Unhealthy", 503, "service_unavailable_error"),
    "expired": _Kind(504, "Overloaded", 504, "timeout_error"),
    "failed": _Kind(424, "Backend", 500, "server_error"),
    "broken": _Kind(500, "Backend", 500, "server_error"),  # a fault of the server's own
}


class Unusable(Refused):
    """A request that the routes refuse. `kind` is one of those above, `param` the field that is wrong."""

    def __init__(self, kind: str, message: str, param: str | None = None):
        super().__init__(message)
        self.kind, self.param = kind, param
        self.status = _KINDS[kind].tei_status


class Refusal(NamedTuple):
    """The answer to a request that gets no result."""

    status: int
    content: dict[str, Any]
    headers: dict[str, str]


Shape = Callable[[Exception], Refusal]


def tei(error: Exception) -> Refusal:
    kind = _KINDS[_kind_of(error)]
    return Refusal(kind.tei_status, {"error": message_of(error), "error_type": kind.tei_type}, _headers(error))


def openai(error: Exception) -> Refusal:
    kind = _KINDS[_kind_of(error)]
    inner = {
        "message": message_of(error), "type": kind.type, "param": getattr(error, "param", None), "code": kind.code,
    }  # fmt: skip
    return Refusal(kind.status, {"error": inner}, _headers(error))


def cohere(error: Exception) -> Refusal:
    message = message_of(error)  # Jina's clients read it as "detail"
    return Refusal(_KINDS[_kind_of(error)].status, {"message": message, "detail": message}, _headers(error))


def shape_of(path: str) -> Shape:
    """Return the shape of errors on a path that no route has."""
    if path.endswith("/rerank") and path != "/rerank":
        return cohere
    return openai if path.startswith("/v1/") or path in ("/score", "/classify", "/pooling") else tei


def message_of(error: Exception) -> str:
    """Return the sentence for the client, which names no option that only whoever runs the server has."""
    if not isinstance(error, (Refused, UserError)):
        return "the server has failed at this request; its log says more"
    said = re.sub(r"--truncate-(left|right)", '"truncate": true', str(error))
    return said if isinstance(error, Unusable) else re.sub(r"; [^;]*--[a-z][^;]*", "", said)


def _kind_of(error: Exception) -> str:
    if isinstance(error, Unusable):
        return error.kind
    kinds: list[tuple[type[Exception], str]] = [
        (TooLong, "too_long"), (UserError, "invalid"), (Overloaded, "overloaded"), (TooLarge, "too_large"),
        (NotServing, "unavailable"), (Expired, "expired"), (Failed, "failed"),
    ]  # fmt: skip
    return next((kind for of, kind in kinds if isinstance(error, of)), "broken")


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, Overloaded):
        return {"Retry-After": str(error.retry_after)}
    if isinstance(error, NotServing):
        return {"Retry-After": "1"}
    if isinstance(error, Unusable) and error.kind == "unauthorized":
        return {"WWW-Authenticate": "Bearer"}
    return {}
