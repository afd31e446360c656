"""`radix-ops serve`: its options, the task that it finds, and the server that it starts."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from helpers import sentence_models
from helpers.commands import parsed, refused_usage
from helpers.language_models import needs_hf, tiny_classifier, tiny_model, tiny_tokenizer
from helpers.processes import LONGEST, python_environment
from helpers.serving import httpx
from radix_ops import cli
from radix_ops.engine.errors import UserError
from radix_ops.serve._command import listener_at
from radix_ops.serve.finding import find_engine, find_task


def test_options_are_those_of_the_environment_too(monkeypatch):
    typed = parsed("serve", "-m", "m", "--port", "0", "--max-body", "512KB", "--request-timeout", "2.5", "--plain")
    for name, value in {"MODEL": "m", "PORT": "0", "MAX_BODY": "512KB", "REQUEST_TIMEOUT": "2.5", "PLAIN": "1"}.items():
        monkeypatch.setenv(f"RADIX_OPS_{name}", value)
    assert parsed("serve") == typed
    assert (typed.max_body, typed.request_timeout, typed.plain, typed.host) == (2**19, 2.5, True, "127.0.0.1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--port 65536", "'65536' is not a port"),
        ("--max-body 1.5GB", "'1.5GB' is not a number of bytes"),
        ("--max-body 0", "'0' is not a number of bytes"),
        ("--shutdown-grace 0", "'0' is not a number of seconds above 0"),
        ("--request-timeout nan", "'nan' is not a number of seconds"),
        ("--task ranking", "invalid choice: 'ranking'"),
        ("--served-model-name a,,b", "must be names with commas"),
    ],
)
def test_values_that_cannot_be_are_errors_of_usage(capsys, arguments, message):
    assert message in refused_usage(capsys, "serve", "-m", "m", *arguments.split())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    needs_hf()
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer(True)
    tokenizer.pad_token = "</s>"
    for name, model in {
        "score": tiny_model(), "classify": tiny_classifier(), "rerank": tiny_classifier(num_labels=1),
        "embed": tiny_model("Qwen3").model,
    }.items():  # fmt: skip
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    made = sentence_models.encoder(sentence_models.save(folder / "base", head="ForCausalLM"), "lasttoken")
    made.save_pretrained(str(folder / "encoder"))
    return folder


@pytest.mark.parametrize(
    ("name", "task"),
    [*[(name, name) for name in ("score", "classify", "rerank", "embed")], ("encoder", "embed")],
)
def test_the_task_is_what_the_folder_is_for(folders, name, task):
    assert find_task(str(folders / name)) == task


def test_an_option_of_another_task_is_refused(folders):
    with pytest.raises(UserError, match=r"^--pooling is not for --task score$"):
        find_engine("score", str(folders / "score"), {"pooling": "mean"})
    assert find_engine("embed", str(folders / "embed"), {"pooling": "mean", "template": None}).poolings == ("mean",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "no/such/folder"], "--model no/such/folder does not exist"),
        (["-m", "{embed}", "--api-key-file", "{embed}/config.json"], "key 2 must be of printable ASCII without spaces"),
        (["-m", "{embed}", "--api-key-file", "no-keys"], "--api-key-file no-keys can't be read: No such file"),
        (["-m", "{embed}", "--host", "256.0.0.1"], "--host 256.0.0.1 --port 8080 can't be listened at"),
        (["-m", "{embed}", "--template", "qwen3-reranker"], "--template is not for --task embed"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(folders, capsys, arguments, message):
    given = [argument.replace("{embed}", str(folders / "embed")) for argument in arguments]
    assert cli.main(["serve", *given]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_answers_are_not_held_back():
    """asyncio sets TCP_NODELAY on connections of a socket whose protocol is named."""
    with listener_at("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
        with pytest.raises(UserError, match=r"can't be listened at: Address already in use$"):
            listener_at("127.0.0.1", listener.getsockname()[1])


def test_the_first_signal_drains_and_the_log_is_json_without_prompts(folders):
    command = [sys.executable, "-m", "radix_ops", "serve", "-m", str(folders / "embed"), "--port", "0", "--warm-up"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=python_environment())
    try:
        assert server.stderr is not None
        line = json.loads(server.stderr.readline())
        assert (line["message"], line["task"], line["level"]) == ("listening", "embed", "info")
        url, end = f"http://127.0.0.1:{line['port']}", time.monotonic() + LONGEST
        while httpx.get(f"{url}/ready").status_code == 503:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert httpx.post(f"{url}/embed", json={"inputs": "a secret"}, timeout=LONGEST).status_code == 200
        server.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in server.stderr]
        assert server.wait(LONGEST) == 0
    finally:
        server.kill()
    assert [line["message"] for line in lines if line["logger"] == "radix_ops.serve"] == ["draining", "stopping"]
    assert {line["route"] for line in lines if line["logger"] == "radix_ops.serve.access"} == {"/ready", "/embed"}
    assert "secret" not in str(lines)
