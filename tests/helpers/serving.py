"""Servers in the test's own process, and a client that speaks to them without a socket.

Importing it skips a module where the extra `serve` is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

fastapi = pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the test client's library is not installed")

from radix_ops.serve import Settings, create_app  # noqa: E402

LONGEST = 60  # seconds


class Client:
    """Calls of an application, one at a time."""

    def __init__(self, app: Any):
        self.app = app

    def call(self, method: str, path: str, **options: Any):
        async def send():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=LONGEST) as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def post(self, path: str, body: Any, **options: Any):
        return self.call("POST", path, json=body, **options)

    def get(self, path: str, **options: Any):
        return self.call("GET", path, **options)

    def ask(self, path: str, **body: Any) -> Any:
        """Return the JSON that answers a request, which must go well."""
        found = self.post(path, body)
        assert found.status_code == 200, found.text
        return found.json()


@contextlib.contextmanager
def served(engine: Any, queue: Any = None, **settings: Any) -> Iterator[Client]:
    """Serve an engine until the end, ready from the start."""
    app = create_app(engine, Settings(**settings), queue=queue)
    server = app.state.server
    server.start()
    try:
        wait_until(lambda: server.batcher.state == "ready")
        yield Client(app)
    finally:
        server.batcher.drain(LONGEST)
        server.batcher.stop()


def wait_until(is_so: Any) -> None:
    """Wait for what happens on another thread."""
    end = time.monotonic() + LONGEST
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)
