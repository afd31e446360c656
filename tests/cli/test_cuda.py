"""The radix-ops command on CUDA: against its own float32 run on the CPU, which other tests hold to transformers."""

import json

import numpy as np
import pytest
import torch

from helpers.commands import QUERIES, QUESTIONS, TEXTS, read_jsonl, write_jsonl
from helpers.language_models import (
    embedding_tokenizer,
    reranking_tokenizer,
    tiny_classifier,
    tiny_model,
    tiny_tokenizer,
)
from radix_ops import cli

pytestmark = pytest.mark.cuda
# Rounding to bfloat16 moves these models' numbers by so much.
BFLOAT16 = 0.05


def model_folder(folder, kind, tokenizer):
    # With narrow heads and widely spread weights, nothing but rounding would show.
    sizes = {"vocab_size": 360, "hidden_size": 64, "head_dim": 64, "initializer_range": 0.1}
    tiny_model(kind, **sizes, max_position_embeddings=512, pad_token_id=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def numbers(path, key):
    return np.concatenate([np.ravel(line[key]) for line in read_jsonl(path)])


def run(tmp_path, command, model, lines, *options):
    path, output = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    arguments = [command, "--model", model, "--overwrite", "--output", output, *options, path]
    assert cli.main([str(argument) for argument in arguments]) == 0
    return output


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
@pytest.mark.parametrize(
    ("command", "key", "tokenizer", "lines", "options"),
    [
        ("score", "logprobs", lambda: tiny_tokenizer(True), QUESTIONS, []),
        ("embed", "embedding", embedding_tokenizer, [{"text": text} for text in TEXTS], []),
        ("embed", "embedding", embedding_tokenizer, [{"text": text} for text in TEXTS], ["--pooling", "mean"]),
        ("rerank", "scores", reranking_tokenizer, QUERIES, ["--template", "qwen3-reranker"]),
    ],
)
def test_cuda_agrees_with_the_cpu(tmp_path, capsys, kind, command, key, tokenizer, lines, options):
    model = model_folder(tmp_path / "model", kind, tokenizer())
    expected = numbers(run(tmp_path, command, model, lines, "--device", "cpu", *options), key)
    for mode in ([], ["--plain"], ["--token-budget", "64"]):
        capsys.readouterr()
        found = numbers(run(tmp_path, command, model, lines, *options, *mode), key)
        assert "computes in bfloat16 on CUDA; --dtype float32 is slower" in capsys.readouterr().err
        scale = np.abs(expected).max()
        assert np.abs(found - expected).max() < BFLOAT16 * scale
        assert np.abs(found - expected).max() > 0
        exact = numbers(run(tmp_path, command, model, lines, *options, *mode, "--dtype", "float32"), key)
        np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma2"])
@pytest.mark.parametrize("has_head", [False, True])
def test_classify_on_cuda_agrees_with_the_cpu(tmp_path, kind, has_head):
    options, folder = [], model_folder(tmp_path / "model", kind, reranking_tokenizer(True))
    if has_head:
        sizes = {"vocab_size": 360, "hidden_size": 64, "head_dim": 64, "initializer_range": 0.1}
        tiny_classifier(kind, 3, **sizes, problem_type="regression").save_pretrained(folder)
    else:
        prompt = {"template": "Text: {{ text }}\nIs it wet?", "labels": {"yes": ["yes", " river"], "no": "no"}}
        (tmp_path / "prompt.json").write_text(json.dumps(prompt))
        options = ["--template", tmp_path / "prompt.json"]
    lines = [{"text": "the sea is salty " + text} for text in TEXTS]
    expected = numbers(run(tmp_path, "classify", folder, lines, "--device", "cpu", *options), "scores")
    for mode in ([], ["--plain"], ["--token-budget", "64"]):
        exact = numbers(run(tmp_path, "classify", folder, lines, *options, *mode, "--dtype", "float32"), "scores")
        np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        found = numbers(run(tmp_path, "classify", folder, lines, *options, *mode), "scores")
        assert 0 < np.abs(found - expected).max() < BFLOAT16 * np.abs(expected).max()


def test_a_model_in_half_precision_says_nothing_of_its_dtype(tmp_path, capsys):
    model = tiny_model("Qwen3", hidden_size=64, head_dim=64).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    embedding_tokenizer().save_pretrained(tmp_path / "model")
    run(tmp_path, "embed", tmp_path / "model", [{"text": "the sea"}])
    assert "bfloat16" not in capsys.readouterr().err


def test_batches_that_do_not_fit_run_in_halves(tmp_path, capsys):
    """The states of these texts would take more at once than the 64 MB that are left."""
    model = model_folder(tmp_path / "model", "Qwen3", embedding_tokenizer())
    lines = [{"text": f"{number:04} " + "the river flows " * 20} for number in range(400)]
    expected = numbers(run(tmp_path, "embed", model, lines), "embedding")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 24 * 2**20) / total)
    try:
        capsys.readouterr()
        found = numbers(run(tmp_path, "embed", model, lines, "--token-budget", 10**6), "embedding")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: going on with batches of half the size" in capsys.readouterr().err
    assert np.abs(found - expected).max() < BFLOAT16


def test_compare_runs_on_cuda(tmp_path, capsys):
    model = model_folder(tmp_path / "model", "Qwen3", reranking_tokenizer())
    run(tmp_path, "rerank", model, QUERIES, "--compare")
    assert "orders that agree: " in capsys.readouterr().out
    assert all(json.loads(line)["scores"] for line in (tmp_path / "out.jsonl").read_text().splitlines())
