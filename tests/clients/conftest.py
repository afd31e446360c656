"""Servers of small models, each a process of the package's own environment, which RADIX_PYTHON names."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PYTHON = os.environ.get("RADIX_PYTHON")
LONGEST = 180  # seconds
KEY = "a-key-for-tests"


def environment() -> dict[str, str]:
    """Return the environment of the package's own Python; proxies are for others than this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RADIX_OPS_", "PYTHON"))}
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("RADIX_PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}


class Server:
    """A server process, ready to answer at `url`."""

    def __init__(self, model: Path, *options: str):
        assert PYTHON, "RADIX_PYTHON must name the Python that radix_ops is installed for"
        self.log = model.with_suffix(f".{time.monotonic_ns()}.log")
        with self.log.open("w") as log:
            command = [PYTHON, "-m", "radix_ops", "serve", "--model", str(model), "--port", "0", *options]
            self.process = subprocess.Popen(command, stderr=log, env=environment())
        self.port = self._when_said()["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self._when_ready()

    def lines(self) -> list[dict]:
        """Return what the server has logged, each line of which is a JSON object."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]

    def _when_said(self) -> dict:
        end = time.monotonic() + LONGEST
        while time.monotonic() < end and self.process.poll() is None:
            found = [line for line in self.lines() if line.get("message") == "listening"]
            if found:
                return found[0]
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def _when_ready(self) -> None:
        end = time.monotonic() + LONGEST
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(self.url + "/ready", timeout=5).read()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.terminate()
        return self.process.wait(LONGEST)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Return the folder of the models."""
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([PYTHON, HERE / "save_models.py", folder], check=True, env=environment(), timeout=600)
    return folder


@pytest.fixture(scope="session")
def expected(models) -> dict:
    """Return what the models' own libraries compute."""
    return json.loads((models / "expected.json").read_text())


def serving(task: str, *options: str):
    @pytest.fixture(scope="session")
    def server(models):
        found = Server(models / task, "--served-model-name", f"tiny-{task}", *options)
        yield found
        assert found.stop() == 0

    return server


embedder, ranker, classifier, scorer = (
    serving(task, "--task", task) for task in ("embed", "rerank", "classify", "score")
)


@pytest.fixture(scope="session")
def guarded(models):
    """Return a server of embeddings that asks for KEY."""
    keys = models / "keys.txt"
    keys.write_text(f"another-key\n{KEY}\n")
    found = Server(models / "embed", "--served-model-name", "tiny-embed", "--api-key-file", str(keys))
    yield found
    assert found.stop() == 0
