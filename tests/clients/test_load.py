"""locust's users, some of whom leave before their answers, and a server that is told to stop under load."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import requests

from conftest import HERE, LONGEST, Server

SECONDS = 10
MEMORY = 200 * 2**20  # bytes that a server may grow by


def memory_of(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_users_get_right_answers_while_others_leave(embedder, expected, tmp_path):
    before = memory_of(embedder.process.pid)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", HERE / "locustfile.py", "--headless", "--only-summary"),
            *("--host", embedder.url, "-u", "16", "-r", "16", "-t", f"{SECONDS}s", "--exit-code-on-error", "1"),
        ],
        capture_output=True, text=True, timeout=LONGEST, cwd=tmp_path,
        env={**os.environ, "RADIX_EXPECTED": str(embedder.log.parent / "expected.json")},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    end = time.monotonic() + LONGEST
    while (queued := requests.get(f"{embedder.url}/stats", timeout=10).json()["batcher"])["requests"]:
        assert time.monotonic() < end, queued
        time.sleep(0.05)
    metrics = requests.get(f"{embedder.url}/metrics", timeout=10).text
    assert any(line.startswith('radix_requests_total{route="/embed",status="499"}') for line in metrics.splitlines()), (
        metrics
    )
    assert memory_of(embedder.process.pid) - before < MEMORY


def test_half_a_body_and_silence_hold_up_nobody(embedder):
    silent = [socket.create_connection(("127.0.0.1", embedder.port)) for _ in range(32)]
    for connection in silent:
        connection.sendall(
            b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
    started = time.monotonic()
    assert requests.post(f"{embedder.url}/embed", json={"inputs": "w1"}, timeout=30).status_code == 200
    assert time.monotonic() - started < 20
    for connection in silent:
        connection.close()


def test_a_server_that_stops_answers_what_it_accepted(models, expected):
    server = Server(models / "embed", "--max-queued-requests", "64")
    statuses: list[int] = []
    stopping = threading.Event()

    def user(seed: int) -> None:
        chosen = random.Random(seed)
        while True:
            body = {"inputs": chosen.choices(expected["texts"], k=8)}
            try:
                statuses.append(requests.post(f"{server.url}/embed", json=body, timeout=60).status_code)
            except requests.ConnectionError as error:
                # Once the port is closed nobody gets in; a request that was sent must be answered.
                refused = "refused" in str(error).lower()
                statuses.append(0 if refused and stopping.is_set() else -1)
                return
            if statuses[-1] == 503:
                return

    users = [threading.Thread(target=user, args=(seed,), daemon=True) for seed in range(24)]
    for thread in users:
        thread.start()
    time.sleep(2)
    stopping.set()
    server.process.terminate()
    for thread in users:
        thread.join(LONGEST)
    assert server.process.wait(LONGEST) == 0
    assert set(statuses) <= {0, 200, 429, 503}, set(statuses)
    assert statuses.count(200) > 10
    messages = [line["message"] for line in server.lines()]
    assert messages.index("draining") < messages.index("stopping")
