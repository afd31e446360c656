"""The server as an ASGI application, which other hosts may mount."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from .._extras import require

for _package in ("fastapi", "uvicorn", "orjson", "prometheus_client"):
    require(_package, "serve", "radix_ops.serve")

from fastapi import FastAPI, Request  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.responses import PlainTextResponse, Response  # noqa: E402
from starlette.types import ASGIApp, Message, Receive, Scope, Send  # noqa: E402

from .. import __version__  # noqa: E402
from ..engine import Classifier, Embedder, Reranker, Scorer  # noqa: E402
from . import openai_routes, replies, rerank_routes, scoring_routes, shapes, task_routes, tei_routes  # noqa: E402
from .bodies import Bodies  # noqa: E402
from .limits import BatchLimits, QueueLimits  # noqa: E402
from .routing import Route, refused, router  # noqa: E402
from .server import Server, server_of  # noqa: E402
from .settings import Settings  # noqa: E402
from .shapes import Unusable  # noqa: E402

_PAGE = Path(__file__).with_name("page.html")
_access = logging.getLogger("radix_ops.serve.access")
_guarded = router(Route, "radix_ops")


def create_app(
    engine: Embedder | Reranker | Classifier | Scorer,
    settings: Settings | None = None,
    *,
    queue: QueueLimits | None = None,
    batch: BatchLimits | None = None,
) -> FastAPI:
    """Return an application that serves the engine's task over HTTP.

    Requests that wait at the same time share batches, and what they share at their starts is computed once. The weights
    are loaded, if they aren't yet, on a thread of the server's own: from the application's start on, or from its first
    request where a host that mounts it starts nothing. Until then requests get 503. When the application ends, it
    refuses new requests and finishes those that it accepted.

    Args:
        engine: the model; one with lazy=True loads its weights later. Nothing else may use it from here on.
        settings: names, API keys and limits of requests.
        queue: what may wait at once; more gets 429.
        batch: limits of a batch.
    """
    server = Server(engine, settings or Settings(), queue or QueueLimits(), batch or BatchLimits())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.start()
        try:
            yield
        finally:
            await asyncio.to_thread(server.batcher.drain, server.settings.shutdown_grace)
            await asyncio.to_thread(server.batcher.stop)

    app = FastAPI(
        title="radix_ops", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,
        description="Embeddings, rankings, labels and log-probabilities; what requests share is computed once.",
    )  # fmt: skip
    app.state.server, app.state.settings = server, server.settings
    app.state.bodies = Bodies(server.settings.max_bodies)
    for routes in (
        tei_routes.routes, task_routes.routes, openai_routes.routes, rerank_routes.routes, scoring_routes.routes,
        scoring_routes.own, _guarded,
    ):  # fmt: skip
        app.include_router(routes)
    _add_open_routes(app)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_middleware(_Observed, server=server)
    return app


def _add_open_routes(app: FastAPI) -> None:
    """Add the routes that need no API key: they tell nothing of requests."""

    @app.get("/health", tags=["radix_ops"])
    async def health(request: Request) -> Response:
        """Return 200 while the server can compute, be it still loading; 503 when it must be started anew."""
        reason = server_of(request).batcher.health()
        if reason is not None:
            return replies.json({"error": reason, "error_type": "Unhealthy"}, 503)
        return replies.json({"status": "ok"})

    @app.get("/ready", tags=["radix_ops"])
    async def ready(request: Request) -> Response:
        """Return 200 while the server takes requests, 503 while it loads or drains."""
        server = server_of(request)
        try:
            server.check_serving()
        except shapes.Refused as error:
            return refused(error, shapes.tei)
        return replies.json({"status": "ready"})

    @app.get("/metrics", tags=["radix_ops"], response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """Return the server's counts and times as Prometheus reads them."""
        content, kind = server_of(request).metrics.exposition()
        return Response(content, media_type=kind)

    page = _PAGE.read_bytes()
    headers = _page_headers(page)

    @app.get("/", include_in_schema=False)
    async def show(request: Request) -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def _page_headers(page: bytes) -> dict[str, str]:
    """Return headers by which the page runs its own script alone, takes nothing from elsewhere and stands in no other
    page."""
    rules = [
        "default-src 'none'",
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
    for kind in ("style", "script"):
        inner = page.split(f"<{kind}>".encode())[1].split(f"</{kind}>".encode())[0]
        digest = base64.b64encode(hashlib.sha256(inner).digest()).decode("ascii")
        rules.append(f"{kind}-src 'sha256-{digest}'")
    return {
        "Content-Security-Policy": "; ".join(rules),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


@_guarded.get("/stats")
async def stats(request: Request) -> Response:
    """Return what the page at / shows: what is served, and how the queue and batches are."""
    server = server_of(request)
    return replies.json({**server.facts(), "batcher": server.batcher.snapshot()})


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    kinds = {404: ("no_route", f"there is no {path} here"), 405: ("method", f"{path} does not take {request.method}")}
    kind, message = kinds.get(error.status_code, ("malformed", str(error.detail)))
    found = refused(Unusable(kind, message), shapes.shape_of(path))
    found.headers.update(error.headers or {})
    return found


class _Observed:
    """Counts and logs every request by its route, and never what it holds."""

    def __init__(self, app: ASGIApp, server: Server):
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._server.start()
        started, status = time.monotonic(), 499  # of a client that went before its answer
        method = scope["method"]
        if method == "HEAD":
            scope = scope | {"method": "GET"}

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif method == "HEAD" and message["type"] == "http.response.body":
                message = message | {"body": b""}
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._server.metrics.observe_request(route, status)
            call = scope.get("state", {}).get("call")
            fields: dict[str, Any] = {
                "route": route, "method": method, "status": status,
                "seconds": round(time.monotonic() - started, 6),
            }  # fmt: skip
            if call is not None:
                fields |= {"tokens": call.timings.tokens, "truncated": call.num_cut}
            _access.info("request", extra={"fields": fields})
