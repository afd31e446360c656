"""sglang-router before two servers: what starts alike goes to one of them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import requests

from conftest import LONGEST, Server

pytest.importorskip("sglang_router", reason="sglang-router is not installed")

PREFIXES = [" ".join(f"w{(number + step) % 7}" for step in range(12 + 2 * number)) for number in range(8)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def routed(*servers: Server) -> Iterator[str]:
    """Run the router that docs/serve-replicas.md describes, and yield its address."""
    url, log = f"http://127.0.0.1:{free_port()}", servers[0].log.with_suffix(".router")
    command = [
        *(sys.executable, "-m", "sglang_router.launch_router", "--policy", "cache_aware", "--host", "127.0.0.1"),
        *("--port", url.rpartition(":")[2], "--prometheus-port", str(free_port()), "--health-check-endpoint", "/ready"),
        *("--health-check-interval-secs", "1", "--health-failure-threshold", "1", "--health-success-threshold", "1"),
        *("--disable-circuit-breaker", "--worker-urls", *(server.url for server in servers)),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_until(lambda: healthy(url) == len(servers) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield url
    finally:
        process.kill()
        process.wait(LONGEST)


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + LONGEST
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


def healthy(url: str) -> int:
    try:
        return requests.get(f"{url}/readiness", timeout=5).json().get("healthy_workers", 0)
    except requests.ConnectionError:
        return 0


def body(task: str, prefix: str, number: int) -> dict:
    text = f"{prefix} w{number}"
    if task == "embed":
        return {"model": "tiny", "input": text}
    return {"model": "tiny", "prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0}


def ask(url: str, task: str, number: int, step: int) -> requests.Response:
    route = {"embed": "/v1/embeddings", "score": "/v1/completions"}[task]
    return requests.post(url + route, json=body(task, PREFIXES[number], step), timeout=60)


def ask_all(url: str, task: str, steps: range) -> list[requests.Response]:
    jobs = [(number, step) for step in steps for number in range(len(PREFIXES))]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda job: ask(url, task, *job), jobs))


def served(server: Server) -> list[int]:
    """Return the tokens of each request that the server answered; a prefix of these is known by them."""
    return [line["tokens"] for line in server.lines() if line.get("route", "").startswith("/v1/") and "tokens" in line]


@pytest.mark.parametrize("task", ["embed", "score"])
def test_what_starts_alike_goes_to_one_server(models, task):
    servers = [Server(models / task, "--task", task, "--served-model-name", "tiny") for _ in range(2)]
    try:
        with routed(*servers) as url:
            answers = ask_all(url, task, range(8))
            assert {answer.status_code for answer in answers} == {200}
            wait_until(lambda: sum(len(served(server)) for server in servers) >= len(answers))
            seen = [served(server) for server in servers]
            sizes = [answer.json()["usage"]["prompt_tokens"] for answer in answers]
            assert len(set(sizes)) == len(PREFIXES)
            assert sorted(seen[0] + seen[1]) == sorted(sizes)
            assert all(seen)
            assert not set(seen[0]) & set(seen[1])
            direct = ask(servers[0].url, task, 3, 5).json()
            through = answers[5 * len(PREFIXES) + 3].json()
            if task == "embed":
                assert through["data"][0]["embedding"] == pytest.approx(direct["data"][0]["embedding"], abs=1e-6)
            else:
                values = [each["choices"][0]["logprobs"]["token_logprobs"] for each in (through, direct)]
                assert values[0][1:] == pytest.approx(values[1][1:], abs=1e-5)
            # Requests that can't be used are answered, and don't count against a server.
            for _ in range(20):
                refused = requests.post(f"{url}/v1/embeddings", json={"model": "other", "input": "w1"}, timeout=60)
                assert refused.status_code == 404
            servers[0].process.kill()
            servers[0].process.wait(LONGEST)
            assert {answer.status_code for answer in ask_all(url, task, range(8, 9))} <= {200, 500, 503}
            wait_until(lambda: healthy(url) == 1)
            assert {answer.status_code for answer in ask_all(url, task, range(9, 10))} == {200}
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait(LONGEST)
