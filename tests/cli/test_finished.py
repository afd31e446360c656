"""A finished job that is asked for again answers without a model, and one that differs in anything does not."""

import contextlib
import os
import re
import shutil

import pytest

from helpers.commands import QUERIES, QUESTIONS, write_jsonl
from helpers.language_models import embedding_tokenizer, reranking_tokenizer, tiny_model
from radix_ops import cli
from radix_ops.data import finished
from radix_ops.engine import _engine, loading

pytest.importorskip("transformers")
TEXTS = [{"text": text, "id": f"d{index}"} for index, text in enumerate(["the sea", "the sea is salt", "été"])]
INPUTS = {"score": QUESTIONS, "embed": TEXTS, "rerank": QUERIES}
EVERY_OUTPUT = pytest.mark.parametrize(
    ("command", "name"),
    [("score", "o.jsonl"), ("score", "o.csv"), ("embed", "o.npy"), ("embed", "o.parquet"), ("rerank", "o.run")],
)


@pytest.fixture
def job(tmp_path):
    """Return a function that runs a command on a model and an input of its own."""

    def run(command, name, *options, status=0):
        folder, file = tmp_path / command, tmp_path / f"{command}.jsonl"
        if not folder.exists():
            model = tiny_model("Qwen3", vocab_size=360, max_position_embeddings=512)
            (model.model if command == "embed" else model).save_pretrained(folder)
            (embedding_tokenizer() if command == "embed" else reranking_tokenizer(False)).save_pretrained(folder)
            write_jsonl(file, INPUTS[command])
        arguments = [command, "--device", "cpu", "--model", folder, "--output", tmp_path / name, *options, file]
        assert cli.main([*map(str, arguments)]) == status

    return run


class Loaded(Exception):
    pass


@pytest.fixture
def no_model(monkeypatch):
    """Return a context in which nothing of a model can be loaded."""

    def load(*arguments, **options):
        raise Loaded

    @contextlib.contextmanager
    def without():
        with monkeypatch.context() as patch:
            for name in ("load_runner", "load_config", "load_tokenizer"):
                for module in (_engine, loading):
                    patch.setattr(module, name, load)
            yield

    return without


@EVERY_OUTPUT
def test_a_finished_job_answers_without_a_model(tmp_path, job, no_model, capsys, command, name):
    job(command, name)
    first = capsys.readouterr()
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("o.")}
    with no_model():
        job(command, name)
    count, again = len(INPUTS[command]), capsys.readouterr()
    behind = first.err.partition(f"wrote {count} results to {tmp_path / name}\n")[2]
    assert again.err == f"{tmp_path / name} holds {count} of {count} results already\n{behind}"
    assert again.out == first.out == ""
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("o.")} == held


def test_what_the_run_said_of_its_results_is_said_again(job, no_model, capsys):
    job("score", "o.csv")
    said = re.search("accuracy of .*", capsys.readouterr().err, re.DOTALL)[0]
    assert len(said.splitlines()) == 4
    with no_model():
        job("score", "o.csv")
    assert said in capsys.readouterr().err


def test_a_job_whose_results_were_there_is_remembered_too(job, no_model, tmp_path, capsys):
    job("score", "o.jsonl")
    shutil.rmtree(finished._cache_folder())
    job("score", "o.jsonl")
    with no_model():
        job("score", "o.jsonl")
    assert "holds 4 of 4 results already" in capsys.readouterr().err


def flip_in_place(path):
    """Change the last byte of a file, and give it the times that it had."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@EVERY_OUTPUT
def test_weights_that_changed_are_never_answered_for(tmp_path, job, no_model, capsys, command, name):
    job(command, name)
    flip_in_place(tmp_path / command / "model.safetensors")
    with no_model(), pytest.raises(Loaded):
        job(command, name)
    job(command, name, status=1)
    assert "--overwrite replaces it" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["input", "output", "tokenizer", "option", "overwrite", "device"])
def test_whatever_else_changed_is_checked_with_the_model(tmp_path, job, no_model, monkeypatch, changed):
    job("score", "o.jsonl")
    options = []
    if changed in ("input", "output", "tokenizer"):
        names = {"input": "score.jsonl", "output": "o.jsonl", "tokenizer": "score/tokenizer.json"}
        flip_in_place(tmp_path / names[changed])
    elif changed == "device":
        monkeypatch.setattr("radix_ops.cli.finished.find_device", lambda name: "cuda:0")
    else:
        options = {"option": ["--truncate-left"], "overwrite": ["--overwrite"]}[changed]
    with no_model(), pytest.raises(Loaded):
        job("score", "o.jsonl", *options)


def test_a_run_that_was_stopped_is_not_remembered(tmp_path, job, no_model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "radix_ops.engine.runners.Qwen3Runner.states", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        job("score", "o.jsonl", status=130)
    with no_model(), pytest.raises(Loaded):
        job("score", "o.jsonl")
