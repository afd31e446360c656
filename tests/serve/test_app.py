"""The application: who is let in, what is refused and in which shape, and what it says of itself."""

import asyncio
import json
import re

import pytest

from helpers.language_models import embedding_tokenizer, needs_hf, tiny_model
from helpers.processes import run_python
from helpers.serving import httpx, served
from radix_ops.engine import Embedder
from radix_ops.engine.errors import UserError
from radix_ops.serve import Settings
from radix_ops.serve.bodies import Bodies, parsed
from radix_ops.serve.refusals import Overloaded
from radix_ops.serve.settings import keys_of
from radix_ops.serve.shapes import Unusable

KEYS = (b"first-key", b"second-key")


@pytest.fixture(scope="module")
def engine():
    needs_hf()
    return Embedder(tiny_model("Qwen3").model, embedding_tokenizer())


@pytest.fixture(scope="module")
def client(engine):
    with served(engine, names=("tiny",), max_body=20_000, max_inputs=16) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(engine):
    with served(engine, keys=KEYS) as client:
        yield client


def shapes(found):
    """Return the keys of an error, those of a nested one behind a dot."""
    return {f"{key}.{inner}" for key, value in found.items() if isinstance(value, dict) for inner in value} | {
        key for key, value in found.items() if not isinstance(value, dict)
    }


TEI = {"error", "error_type"}
OPENAI = {"error.message", "error.type", "error.param", "error.code"}
COHERE = {"message", "detail"}


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        *[("/embed", TEI), ("/v1/embeddings", OPENAI), ("/v2/rerank", COHERE), ("/pooling", OPENAI), ("/choices", TEI)],
        *[("/none", TEI), ("/v1/none", OPENAI), ("/", TEI)],
    ],
)
def test_errors_have_the_shape_of_their_family(client, path, shape):
    for found in (
        client.post(path, [1]),
        client.call("POST", path, content=b"{", headers={"Content-Type": "application/json"}),
        client.call("POST", path, content=b"{}", headers={"Content-Type": "text/plain"}),
        client.call("DELETE", path),
    ):
        assert 400 <= found.status_code < 500
        assert shapes(found.json()) == shape, found.text


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/embed", b"{", 400),
        ("/embed", b"", 400),
        ("/embed", b'{"inputs": "\xff"}', 400),
        ("/embed", b'{"inputs": "\\ud800"}', 400),
        ("/embed", b'{"inputs": NaN}', 400),
        ("/embed", b"[]", 422),
        ("/embed", b'{"inputs": {}}', 422),
        ("/embed", b'{"inputs": [true]}', 422),
        ("/embed", b'{"inputs": [1, "a"]}', 422),
        ("/embed", b'{"inputs": [-1]}', 422),
        ("/embed", b'{"inputs": [1e9]}', 422),
        ("/embed", b'{"inputs": [99999999999999999999]}', 422),
        ("/embed", b'{"inputs": "a", "truncate": "sometimes"}', 422),
        ("/embed", b'{"inputs": "a", "cache_salt": "' + b"x" * 257 + b'"}', 422),
        ("/embed", b'{"inputs": ' + b"[" * 30 + b"]" * 30 + b"}", 422),
        ("/embed", b'{"inputs": ' + b"[" * 9000 + b"]" * 9000 + b"}", 400),
        ("/embed", b'{"inputs": []}', 400),
        ("/embed", json.dumps({"inputs": ["a"] * 17}).encode(), 413),
        ("/embed", json.dumps({"inputs": "a" * 20_001}).encode(), 413),
        ("/v1/embeddings", json.dumps({"input": ["a"] * 17}).encode(), 400),
        ("/v1/embeddings", json.dumps({"input": "a" * 20_001}).encode(), 413),
        ("/v1/embeddings", b'{"input": "a", "encoding_format": "int8"}', 400),
        ("/v1/embeddings", b'{"input": "a", "dimensions": 0}', 400),
        ("/v1/embeddings", b'{"input": "a", "model": "other"}', 404),
        ("/rerank", b'{"query": "a", "texts": ["b"]}', 404),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": 1}', 404),
    ],
)
def test_bodies_that_cannot_be_used_are_refused(client, path, content, status):
    found = client.call("POST", path, content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == status, found.text


def test_a_body_without_a_length_is_bounded_too(client):
    async def parts():
        for _ in range(40):
            yield b"a" * 1000

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test") as inner:
            return await inner.post("/embed", content=parts(), headers={"Content-Type": "application/json"})

    assert asyncio.run(send()).status_code == 413


@pytest.mark.parametrize("depth", range(1, 12))
def test_depth_is_counted_exactly(depth):
    deep = b"[" * depth + b"]" * depth
    wide = b"[" + b",".join([b"[]"] * 20) + b"]"
    for body, levels in ((deep, depth), (b'{"a": ' + deep + b"}", depth + 1), (wide, 2)):
        if levels <= 5:
            parsed(body, 5)
        else:
            with pytest.raises(Unusable, match="more than 5 deep"):
                parsed(body, 5)


def test_bodies_that_are_held_are_bounded_together():
    bodies = Bodies(100)
    with bodies.reading() as first, bodies.reading() as second:
        first(60)
        second(40)
        with pytest.raises(Overloaded):
            second(1)
    with bodies.reading() as third:
        third(100)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_lets_in(guarded, key):
    for headers in ({"Authorization": f"Bearer {key.decode()}"}, {"X-API-Key": key.decode()}):
        assert guarded.post("/embed", {"inputs": "a"}, headers=headers).status_code == 200
        assert guarded.get("/info", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        *[{}, {"Authorization": "Bearer first-ke"}, {"Authorization": "Bearer first-key2"}, {"X-API-Key": ""}],
        *[{"Authorization": "first-key"}, {"Authorization": "Basic first-key"}, {"X-API-Key": "x" * 5000}],
    ],
)
def test_no_other_key_lets_in(guarded, headers):
    for path, shape in (("/embed", TEI), ("/v1/embeddings", OPENAI), ("/v2/rerank", COHERE)):
        found = guarded.post(path, {"inputs": "a"}, headers=headers)
        assert (found.status_code, found.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert shapes(found.json()) == shape
    for path in ("/info", "/stats", "/v1/models"):
        assert guarded.get(path, headers=headers).status_code == 401


def test_a_key_is_asked_for_before_a_body_is_read(guarded):
    found = guarded.call("POST", "/embed", content=b"{", headers={"Content-Type": "application/json"})
    assert found.status_code == 401


def test_health_metrics_and_page_need_no_key(guarded):
    for path in ("/health", "/ready", "/metrics", "/", "/openapi.json"):
        assert guarded.get(path).status_code == 200


def test_keys_stand_in_a_file_one_a_line():
    assert keys_of("# ours\nfirst-key\n\n second-key \nfirst-key\n", "keys") == KEYS
    for text in ("", "# none\n", "a b\n", "schlüssel\n", "x" * 1025):
        with pytest.raises(UserError, match="^keys"):
            keys_of(text, "keys")
    assert "first-key" not in repr(Settings(keys=KEYS))


@pytest.mark.parametrize("wrong", [{"max_body": 0}, {"max_inputs": True}, {"request_timeout": 0}, {"max_depth": 1.5}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Settings(**wrong)


def test_requests_are_counted_by_route_and_status(client):
    def count(route, status):
        pattern = rf'^radix_requests_total{{route="{route}",status="{status}"}} (\d+)'
        found = re.search(pattern, client.get("/metrics").text, re.MULTILINE)
        return int(found[1]) if found else 0

    before = count("/embed", 200), count("/embed", 422), count("unknown", 404)
    client.ask("/embed", inputs="a")
    client.post("/embed", {"inputs": 3})
    client.get("/a/path/that/nobody/has")
    assert (count("/embed", 200), count("/embed", 422), count("unknown", 404)) == tuple(n + 1 for n in before)


def test_the_page_takes_nothing_from_elsewhere(client):
    found = client.get("/")
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", found.text)
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_stats_are_what_the_page_shows(client):
    client.ask("/embed", inputs="a")
    found = client.get("/stats").json()
    assert (found["names"], found["task"], found["state"], found["folded"]) == (["tiny"], "embed", "ready", True)
    assert found["batcher"]["total_tokens"] >= found["batcher"]["total_rows"] > 0
    assert found["batcher"]["latency"]["p50"] > 0


def test_openapi_has_every_route(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/", "/choices", "/classify", "/decode", "/embed", "/embed_all", "/health", "/info", "/metrics", "/pooling",
        "/predict", "/ready", "/rerank", "/score", "/similarity", "/stats", "/tokenize", "/v1/completions",
        "/v1/embeddings", "/v1/models", "/v1/models/{model}", "/v1/rerank", "/v1/score", "/v2/rerank",
    }  # fmt: skip


def test_logs_tell_routes_and_counts_and_no_text(client, caplog):
    with caplog.at_level("INFO", "radix_ops.serve.access"):
        client.ask("/embed", inputs="an unusual sentence")
    (record,) = (record for record in caplog.records if record.name == "radix_ops.serve.access")
    assert record.fields["route"] == "/embed"
    count = len(embedding_tokenizer()("an unusual sentence")["input_ids"])
    assert (record.fields["status"], record.fields["tokens"]) == (200, count)
    assert "unusual" not in str(record.fields) + record.getMessage()


def test_the_host_on_ray_names_the_library_that_it_lacks():
    done = run_python("-c", "import sys; sys.modules['ray'] = None; import radix_ops.serve.ray")
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: radix_ops.serve.ray needs ray >= 2.60, which is not installed; in a checkout of radix_ops: "
        "pip install --no-build-isolation '.[serve-ray]'"
    )
