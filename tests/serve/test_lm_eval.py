"""lm-evaluation-harness asks a server by its local-completions as it asks transformers."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from helpers.language_models import TEXT, needs_hf, tiny_model, tiny_tokenizer
from helpers.serving import wait_until
from radix_ops.engine import Scorer
from radix_ops.serve import Settings, create_app

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("tenacity", reason="lm-eval's clients of servers need it")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
CONTEXTS = [TEXT[1] + " Answer:", TEXT[2], TEXT[2] + " Not:"]
CHOICES = [" yes", " no", " the Seine", " river"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    needs_hf()
    path = tmp_path_factory.mktemp("causal")
    tiny_model(max_position_embeddings=256).save_pretrained(path)
    tokenizer = tiny_tokenizer(False)
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(path)
    return str(path)


@contextlib.contextmanager
def listening(app):
    """Serve an application on a port of its own; return the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        wait_until(lambda: app.state.server.batcher.state == "ready")
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def test_answers_are_those_of_transformers(folder):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
    with listening(create_app(Scorer(folder, device="cpu", lazy=True), Settings(names=("tiny",)))) as port:
        ours = LocalCompletionsAPI(
            base_url=f"http://127.0.0.1:{port}/v1/completions", model="tiny", tokenizer=folder, batch_size=4,
            num_concurrent=3, max_retries=1, max_length=256,
        )  # fmt: skip
        asked = [(context, choice) for context in CONTEXTS for choice in CHOICES]
        found = ours.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
        expected = theirs.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
        rolled = ours.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXT]), True)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    whole = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXT]), True)
    assert rolled == pytest.approx(whole, abs=1e-3)
