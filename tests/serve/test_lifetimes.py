"""Requests that wait, leave, fail or come too late, and servers that load and drain."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest

from helpers.language_models import embedding_tokenizer, needs_hf, tiny_model
from helpers.serving import Client, httpx, wait_until
from radix_ops.engine import Embedder
from radix_ops.serve import QueueLimits, Settings, create_app


@pytest.fixture(scope="module")
def engine():
    needs_hf()
    return Embedder(tiny_model("Qwen3").model, embedding_tokenizer())


class Held:
    """A model's computation that waits until it is let go."""

    def __init__(self, client):
        self.tasks = client.app.state.server.tasks
        self.entered, self.go, self.count = threading.Event(), threading.Event(), 0
        compute = self.tasks._computings["pooled"]

        def held(sequences, extras):
            self.count += len(sequences)
            self.entered.set()
            assert self.go.wait(60)
            return compute(sequences, extras)

        self.tasks._computings["pooled"] = held


def fresh(engine, queue=None, **settings):
    """Return a client of a server of its own, which serves."""
    app = create_app(engine, Settings(**settings), queue=queue)
    app.state.server.start()
    wait_until(lambda: app.state.server.batcher.state == "ready")
    return Client(app)


def stop(client):
    batcher = client.app.state.server.batcher
    batcher.drain(60)
    batcher.stop()


def in_background(client, *arguments):
    found = []
    thread = threading.Thread(target=lambda: found.append(client.post(*arguments)), daemon=True)
    thread.start()
    return thread, found


def test_a_client_that_leaves_is_not_computed_for(engine):
    client = fresh(engine)
    held = Held(client)
    first, found = in_background(client, "/embed", {"inputs": "a"})
    assert held.entered.wait(60)

    async def leave():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test") as inner:
            task = asyncio.ensure_future(inner.post("/embed", json={"inputs": ["b"] * 7}))
            while client.app.state.server.batcher.snapshot()["requests"] < 2:
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    wait_until(lambda: client.app.state.server.batcher.snapshot()["requests"] == 1)
    held.go.set()
    first.join(60)
    stop(client)
    assert found[0].status_code == 200
    assert held.count == 1


def test_disconnects_are_noticed_while_a_request_waits(engine):
    """As uvicorn tells it: a message behind the body."""
    client = fresh(engine)
    held = Held(client)
    gone = asyncio.Event()
    body = json.dumps({"inputs": "a"}).encode()

    async def run():
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/embed", "raw_path": b"/embed", "query_string": b""}
        scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "server": None, "client": None}
        task = asyncio.ensure_future(client.app(scope | {"asgi": {"version": "3.0"}, "root_path": ""}, receive, send))
        while not held.entered.is_set():
            await asyncio.sleep(0.005)
        gone.set()
        await asyncio.wait_for(task, 60)

    asyncio.run(run())
    held.go.set()
    stop(client)
    assert 'radix_requests_total{route="/embed",status="499"} 1.0' in client.get("/metrics").text


def test_too_much_at_once_gets_429_and_the_time_to_come_again(engine):
    client = fresh(engine, QueueLimits(max_requests=1))
    held = Held(client)
    first, found = in_background(client, "/embed", {"inputs": "a"})
    assert held.entered.wait(60)
    for path, body in (("/embed", {"inputs": "b"}), ("/v1/embeddings", {"input": "b"})):
        refused = client.post(path, body)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
    held.go.set()
    first.join(60)
    stop(client)
    assert found[0].status_code == 200


def test_a_request_whose_time_is_over_gets_504(engine):
    client = fresh(engine, request_timeout=0.2)
    held = Held(client)
    first, _ = in_background(client, "/embed", {"inputs": "a"})
    assert held.entered.wait(60)
    started = time.monotonic()
    assert client.post("/embed", {"inputs": "b"}).status_code == 504
    assert time.monotonic() - started < 30
    held.go.set()
    first.join(60)
    stop(client)


def test_a_draining_server_finishes_what_it_accepted_and_takes_no_more(engine):
    client = fresh(engine)
    held, batcher = Held(client), client.app.state.server.batcher
    first, found = in_background(client, "/embed", {"inputs": "a"})
    assert held.entered.wait(60)
    draining = threading.Thread(target=batcher.drain, args=(60,), daemon=True)
    draining.start()
    wait_until(lambda: batcher.state == "draining")
    assert client.get("/health").status_code == 200
    for refused in (client.get("/ready"), client.post("/embed", {"inputs": "b"})):
        assert (refused.status_code, refused.json()["error_type"]) == (503, "Unhealthy")
    held.go.set()
    first.join(60)
    draining.join(60)
    batcher.stop()
    assert found[0].status_code == 200


def test_requests_get_503_while_the_model_loads(engine, monkeypatch):
    go = threading.Event()
    app = create_app(engine)
    server = app.state.server
    load = server.engine.check
    monkeypatch.setattr(server.engine, "check", lambda *given: go.wait(60) and load(*given))
    client = Client(app)
    for refused in (client.post("/embed", {"inputs": "a"}), client.get("/ready"), client.get("/info")):
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert client.get("/health").status_code == 200
    go.set()
    # The first request started the server.
    wait_until(lambda: client.get("/ready").status_code == 200)
    assert client.post("/embed", {"inputs": "a"}).status_code == 200
    stop(client)


def test_what_fails_fails_alone_and_says_nothing_of_the_request(engine, caplog):
    client = fresh(engine)
    tasks = client.app.state.server.tasks
    compute = tasks._computings["pooled"]

    def fail(sequences, extras):
        if any(42 in ids for ids in sequences):
            raise RuntimeError("a secret of the request")
        return compute(sequences, extras)

    tasks._computings["pooled"] = fail
    statuses = {}
    threads = [
        threading.Thread(target=lambda ids=ids: statuses.update({ids[0]: client.post("/embed", {"inputs": ids})}))
        for ids in ([7, 8], [9, 42], [11, 8], [13])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    stop(client)
    assert {key: found.status_code for key, found in statuses.items()} == {7: 200, 9: 424, 11: 200, 13: 200}
    assert "secret" not in statuses[9].text
    assert "secret" not in caplog.text


def test_numbers_that_are_not_finite_are_errors(engine):
    client = fresh(engine)
    tasks = client.app.state.server.tasks
    tasks._computings["pooled"] = lambda sequences, extras: np.full((len(sequences), 32), np.nan, np.float32)
    found = client.post("/embed", {"inputs": ["a", "b"]})
    stop(client)
    assert (found.status_code, found.json()["error_type"]) == (424, "Backend")
    assert found.json()["error"].startswith("inputs[0] got an embedding that is not finite")


def test_another_application_may_mount_it(engine):
    from starlette.applications import Starlette
    from starlette.routing import Mount

    inner = create_app(engine)
    outer = Client(Starlette(routes=[Mount("/models/one", inner)]))
    wait_until(lambda: outer.get("/models/one/ready").status_code == 200)
    assert len(outer.post("/models/one/embed", {"inputs": "a"}).json()[0]) == 32
    stop(Client(inner))


def test_a_body_that_does_not_come_gets_504(engine):
    client = fresh(engine, request_timeout=0.2)

    async def parts():
        yield b'{"inputs": '
        await asyncio.sleep(60)

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test") as inner:
            return await inner.post("/embed", content=parts(), headers={"Content-Type": "application/json"})

    found = asyncio.run(send())
    stop(client)
    assert (found.status_code, found.json()["error"]) == (504, "the body was not there within 0.2 seconds")
