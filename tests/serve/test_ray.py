"""Replicas on a local Ray. `make test-ray` runs it."""

import asyncio
import concurrent.futures
import contextlib
import secrets
import shutil
import socket
import tempfile
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("ray", reason="the extra `serve-ray` is not installed")

import ray
from ray import serve

from helpers import sentence_models
from helpers.language_models import needs_hf
from helpers.serving import Client, httpx, wait_until
from radix_ops.engine import Embedder
from radix_ops.engine.errors import UserError
from radix_ops.serve import create_app
from radix_ops.serve.ray import _Replica, deployment

LONGEST = 120  # seconds
STICKY = {"request_router_class": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"}
TEXTS = sentence_models.texts(10)


@pytest.fixture(autouse=True)
def _time_limit():
    """Replicas take longer to start than the other tests may."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    needs_hf()
    folder = tmp_path_factory.mktemp("ray")
    made = sentence_models.encoder(sentence_models.save(folder / "base"), "lasttoken", sentence_models.Normalize())
    made.save_pretrained(str(folder / "embed"))
    return folder / "embed"


@pytest.fixture(scope="module")
def url():
    """Start a Ray of its own, which believes in a GPU, and return the address that Serve answers at."""
    folder = tempfile.mkdtemp(prefix="ray")  # whose sockets need a short name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
    patch.setenv("OMP_NUM_THREADS", "1")
    try:
        ray.init(
            address="local", num_cpus=2, num_gpus=1, object_store_memory=100 * 2**20, include_dashboard=False,
            _temp_dir=folder, logging_level="error", log_to_driver=False,
        )  # fmt: skip
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)


def options(model, **given):
    """Return arguments of a deployment of two small replicas."""
    chosen = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}, "request_router_config": STICKY}
    return {"model": str(model), "task": "embed", "device": "cpu", "ray": {**chosen, **given}}


@pytest.fixture
def two(url, model):
    """Deploy two replicas, if they don't stand already, and return the service's address."""
    if running() != 2:
        serve.run(deployment(options(model)))
        wait_until_running(2)
    return url


def running():
    found = serve.status().applications.get("default")
    return found.deployments["radix_ops"].replica_states.get("RUNNING", 0) if found else 0


def wait_until_running(count):
    end = time.monotonic() + LONGEST
    while running() != count:
        assert time.monotonic() < end, serve.status()
        time.sleep(0.2)


def post(url, body, session=None, path="/embed"):
    headers = {} if session is None else {"x-session-id": session}
    return httpx.post(url + path, json=body, headers=headers, timeout=60, trust_env=False)


def sessions_of_each(url):
    """Return two names of sessions, one of each replica, and their replicas."""
    found = {}
    for number in range(100):
        name = f"session {number}"
        found.setdefault(post(url, {"inputs": "w1"}, name).headers["x-replica"], name)
        if len(found) == 2:
            return found
    raise AssertionError(found)


def stats(url, session):
    answer = httpx.get(url + "/stats", headers={"x-session-id": session}, timeout=60, trust_env=False).json()
    return answer["batcher"]


@contextlib.contextmanager
def users(url, count=6):
    """Let users ask until the end. Yields the list of their answers: status and vectors."""
    answers, stopping = [], threading.Event()

    def ask(seed):
        chosen = np.random.default_rng(seed)
        while not stopping.is_set():
            numbers = chosen.integers(len(TEXTS), size=4).tolist()
            found = post(url, {"inputs": [TEXTS[number] for number in numbers]})
            answers.append((found.status_code, numbers, found.json() if found.status_code == 200 else found.text))

    threads = [threading.Thread(target=ask, args=(seed,), daemon=True) for seed in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stopping.set()
        for thread in threads:
            thread.join(LONGEST)
    assert not any(thread.is_alive() for thread in threads)


def check(answers, model):
    """Compare what was answered with the model's own library."""
    expected = reference(model)
    for status, numbers, found in answers:
        if status == 200:
            np.testing.assert_allclose(np.array(found), expected[numbers], atol=1e-5)


def reference(model):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(model), device="cpu").encode(TEXTS)


def test_replicas_answer_as_the_application_in_process_does(two, model):
    client = Client(create_app(Embedder(str(model), lazy=True, device="cpu")))
    client.app.state.server.start()
    wait_until(lambda: client.app.state.server.batcher.ready)
    for path, body in (
        ("/embed", {"inputs": TEXTS}),
        ("/v1/embeddings", {"input": TEXTS, "model": str(model)}),
        ("/embed", {"inputs": 5}),
        ("/v1/embeddings", {"input": [], "model": str(model)}),
        ("/rerank", {"query": "w1", "texts": ["w2"]}),
        ("/nothing", {}),
    ):
        own = client.post(path, body)
        answers = [post(two, body, session, path) for session in sessions_of_each(two).values()]
        assert len({answer.headers["x-replica"] for answer in answers}) == 2
        for answer in answers:
            assert answer.status_code == own.status_code
            assert answer.headers["content-type"] == own.headers["content-type"]
            if own.status_code != 200:
                assert answer.json() == own.json()
            elif path == "/embed":
                np.testing.assert_allclose(np.array(answer.json()), reference(model), atol=1e-5)
                np.testing.assert_allclose(np.array(answer.json()), np.array(own.json()), atol=1e-6)
            else:
                vectors = [[entry["embedding"] for entry in each.json()["data"]] for each in (answer, own)]
                np.testing.assert_allclose(np.array(vectors[0]), np.array(vectors[1]), atol=1e-6)
                assert answer.json()["usage"] == own.json()["usage"]
    client.app.state.server.batcher.stop()


def test_requests_of_a_session_meet_in_one_replica(two):
    """A session is named for each prefix; what a replica counted is what its sessions sent, and rows were shared."""
    first = sessions_of_each(two)
    before = {replica: stats(two, session) for replica, session in first.items()}
    prefixes = [" ".join(f"w{(number + step) % 7}" for step in range(20 + number)) for number in range(8)]
    jobs = [(number, step) for step in range(8) for number in range(len(prefixes))]

    def ask(job):
        number, step = job
        answer = post(two, {"inputs": f"{prefixes[number]} w{step % 5} w{step // 5}"}, prefixes[number])
        assert answer.status_code == 200
        return number, answer.headers["x-replica"], int(answer.headers["x-compute-tokens"])

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, jobs))
    replicas = {number: {replica for n, replica, _ in answers if n == number} for number in range(len(prefixes))}
    assert all(len(found) == 1 for found in replicas.values()), replicas
    rows = tokens = 0
    for replica, session in first.items():
        after = stats(two, session)
        counted = after["total_tokens"] - before[replica]["total_tokens"]
        assert counted == sum(size for _, found, size in answers if found == replica)
        tokens += counted
        rows += after["total_rows"] - before[replica]["total_rows"]
    assert rows < tokens


def test_a_killed_replica_is_replaced_and_loses_its_own_requests_alone(two, model):
    victim = next(iter(sessions_of_each(two)))
    with users(two) as answers:
        wait_until(lambda: len(answers) > 20)
        names = [each for each in ray.util.list_named_actors(all_namespaces=True) if each["name"].endswith(victim)]
        killed = len(answers)
        ray.kill(ray.get_actor(**names[0]))
        wait_until_running(1)
        wait_until_running(2)
        recovered = len(answers)
        wait_until(lambda: len(answers) > recovered + 20)
    statuses = [status for status, _, _ in answers]
    assert set(statuses) <= {200, 500, 503}, set(statuses)
    lost = [found for status, _, found in answers if status != 200]
    assert len(lost) <= 6, lost  # each user had one request under way
    assert all(lost), "a refusal says why"
    assert statuses[:killed].count(200) == killed
    assert set(statuses[recovered + 6 :]) == {200}
    assert victim not in sessions_of_each(two)
    check(answers, model)


def test_a_replica_that_is_taken_away_answers_what_it_accepted(two, model):
    with users(two) as answers:
        wait_until(lambda: len(answers) > 20)
        serve.run(deployment(options(model, num_replicas=1)))
        wait_until_running(1)
        one = len(answers)
        wait_until(lambda: len(answers) > one + 20)
    assert {status for status, _, _ in answers} == {200}
    check(answers, model)


def test_replicas_follow_the_load(url, model):
    scaling = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 0.5,
        "metrics_interval_s": 0.2, "look_back_period_s": 1,
    }  # fmt: skip
    given = options(model, autoscaling_config=scaling)
    del given["ray"]["num_replicas"]
    serve.delete("default")
    serve.run(deployment(given))
    wait_until_running(1)
    with users(url) as answers:
        wait_until_running(2)
    serve.delete("default")
    assert {status for status, _, _ in answers} == {200}


def test_a_model_that_cannot_be_loaded_fails_the_deployment(url, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    serve.delete("default")
    with pytest.raises(RuntimeError, match="Failed to update"):
        serve.run(deployment(options(broken, max_constructor_retry_count=1)))
    message = serve.status().applications["default"].deployments["radix_ops"].message
    serve.delete("default")
    assert "could not be loaded" in message
    assert str(broken) in message


def test_a_replica_without_a_gpu_of_the_clusters_does_not_compute_on_the_cpu(url, model):
    given = options(model, ray_actor_options={"num_cpus": 0.5, "num_gpus": 0}, max_constructor_retry_count=1)
    del given["device"]
    serve.delete("default")
    with pytest.raises(RuntimeError, match="Failed to update"):
        serve.run(deployment(given))
    message = serve.status().applications["default"].deployments["radix_ops"].message
    serve.delete("default")
    assert "set num_gpus in ray_actor_options to 1, or device to cpu" in message


def test_health_is_that_of_the_application(model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    for folder, is_good in ((model, True), (broken, False)):
        client = Client(create_app(Embedder(str(folder), lazy=True, device="cpu")))
        server = client.app.state.server
        server.start()
        wait_until(lambda server=server: server.batcher.state in ("ready", "dead"))
        answer = client.get("/health")
        assert (answer.status_code == 200) == is_good
        replica = SimpleNamespace(_server=server)
        if is_good:
            asyncio.run(_Replica.check_health(replica))
        else:
            with pytest.raises(RuntimeError) as error:
                asyncio.run(_Replica.check_health(replica))
            assert str(error.value) == answer.json()["error"]
        server.batcher.stop()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--model"),
        ({"model": "m", "modle": "m"}, "no option modle \\(did you mean model\\?\\)"),
        ({"model": "m", "port": 8000}, "port is Ray's to say"),
        ({"model": "m", "config": "x.toml"}, "no option config"),
        ({"model": "m", "token_budget": "many"}, "'many' is not a whole number"),
        ({"model": "m", "plain": "perhaps"}, "plain is 'perhaps'; it must be true or false"),
        ({"model": "m", "ray": 2}, "ray must be options"),
        ({"model": "m", "ray": {"num_replicsa": 2}}, "num_replicsa"),
        ({"model": "m", "ray": {"num_replicas": -1}}, "num_replicas"),
    ],
)
def test_what_cannot_be_used_is_an_error_before_anything_starts(given, message):
    with pytest.raises(UserError, match=message):
        deployment(given)


def test_options_are_those_of_the_command(monkeypatch):
    monkeypatch.setenv("RADIX_OPS_MAX_QUEUED_REQUESTS", "7")
    given = {"model": "m", "plain": "true", "shutdown_grace": 5, "threads": "3", "device": "cuda"}
    found = deployment(given)._bound_deployment
    args = found.init_args[0]
    assert (args.model, args.plain, args.warm_up, args.shutdown_grace, args.threads) == ("m", True, False, 5.0, 3)
    assert found.max_ongoing_requests == args.max_queued_requests == 7
    assert found.ray_actor_options == {"num_cpus": 3, "num_gpus": 1}
    given["ray"] = {"ray_actor_options": {"num_cpus": 2}, "max_ongoing_requests": 9}
    found = deployment(given)._bound_deployment
    assert (found.ray_actor_options, found.max_ongoing_requests) == ({"num_cpus": 2, "num_gpus": 1}, 9)
