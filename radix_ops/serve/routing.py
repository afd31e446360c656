"""Routes: a request is let in, read and answered, and given up when its client goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from . import shapes
from .bodies import JSONRequest, in_time
from .inputs import shown
from .settings import Settings
from .shapes import Shape, Unusable

_logger = logging.getLogger(__name__)
_WANTED = {  # by the start of pydantic's names of faults
    "int_": "a whole number", "bool_": "true or false", "string_type": "a string", "float_": "a number",
    "model_": "an object", "dict_": "an object",
}  # fmt: skip


class Route(APIRoute):
    """A route of JSON whose errors have a family's shape, and whose work ends when its client goes."""

    shape: Shape = staticmethod(shapes.tei)

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def run(request: Request) -> Response:
            request.state.arrived = time.monotonic()
            try:
                settings = request.app.state.settings
                check_key(request, settings)
                if request.method != "POST":
                    return await handle(request)
                check_media(request)
                with request.app.state.bodies.reading() as held:
                    read = JSONRequest(request.scope, request.receive, settings, held)
                    await in_time(read.json(), settings.request_timeout)
                    return await _while_connected(read, handle(read))
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                return refused(error, self.shape)

        return run


class OpenAIRoute(Route):
    shape: Shape = staticmethod(shapes.openai)


class CohereRoute(Route):
    shape: Shape = staticmethod(shapes.cohere)


def router(route_class: type[Route], tag: str) -> APIRouter:
    return APIRouter(route_class=route_class, tags=[tag])


def refused(error: Exception, shape: Shape) -> Response:
    """Return the answer to a request that gets no result. A fault of the server's own is logged, without what the
    request held."""
    if isinstance(error, RequestValidationError):
        error = _from_validation(error)
    status, content, headers = shape(error)
    if status >= 500 and not isinstance(error, shapes.Refused):
        _log_fault(error)
    return Response(orjson.dumps(content), status, headers, "application/json")


def _log_fault(error: BaseException) -> None:
    """Log kinds and places of an error and its causes; messages may quote a request."""
    while error is not None:
        places = []
        trace = error.__traceback__
        while trace is not None:
            places.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
            trace = trace.tb_next
        _logger.error("%s at %s", type(error).__name__, " < ".join(reversed(places[-8:])))
        error = error.__cause__ or error.__context__  # type: ignore[assignment]


def _from_validation(error: RequestValidationError) -> Unusable:
    faults = error.errors()[:3]
    paths = [[str(part) for part in fault["loc"] if part != "body"] for fault in faults]
    message = "; ".join(_fault(".".join(path), fault) for path, fault in zip(paths, faults, strict=True))
    return Unusable("invalid", message, paths[0][0] if paths and paths[0] else None)


def _fault(where: str, fault: Any) -> str:
    kind, said = fault["type"], fault["msg"]
    if kind == "missing":
        return f"{where}: field required"
    wanted = next((words for start, words in _WANTED.items() if kind.startswith(start)), None)
    must = f"it must be {wanted}" if wanted else said[:1].lower() + said[1:]
    return f"{where or 'the body'} is {shown(fault['input'])}; {must}"


def check_key(request: Request, settings: Settings) -> None:
    """Unusable unless the request brings one of the API keys, as a bearer or as x-api-key."""
    if not settings.keys:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    given = key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")
    if not settings.admits(None if given is None else given.encode("utf-8", "replace")):
        raise Unusable("unauthorized", "no API key, or a wrong one; send it as Authorization: Bearer KEY")


def check_media(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Unusable("media", "the body must be JSON, with Content-Type: application/json")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise Unusable("media", f"the body's Content-Encoding is {shown(coding)}; it must be sent as it is")


async def _while_connected(request: Request, work: Any) -> Response:
    """Await the work, or cancel it when the client has gone."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
