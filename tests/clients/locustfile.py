"""Users of a server of embeddings: most wait for their answers and check them, some leave."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path

import requests
from locust import HttpUser, constant, task

EXPECTED = json.loads(Path(os.environ["RADIX_EXPECTED"]).read_text())


class Reader(HttpUser):
    wait_time = constant(0)

    @task(8)
    def embed(self):
        chosen = random.choices(range(len(EXPECTED["texts"])), k=random.randint(1, 12))
        with self.client.post(
            "/embed", json={"inputs": [EXPECTED["texts"][index] for index in chosen]}, catch_response=True
        ) as found:
            if found.status_code != 200:
                found.failure(f"status {found.status_code}")
                return
            wanted = (EXPECTED["embeddings"][index] for index in chosen)
            if any(
                abs(x - y) > 2e-6
                for row, other in zip(found.json(), wanted, strict=True)
                for x, y in zip(row, other, strict=True)
            ):
                found.failure("another text's embedding")

    @task(2)
    def leave(self):
        soon = random.uniform(0.001, 0.05)
        with contextlib.suppress(requests.RequestException):
            requests.post(f"{self.host}/embed", json={"inputs": EXPECTED["texts"] * 50}, timeout=soon)
