"""The rows that `radix-ops inspect` promises are those that a run computes."""

import re

import pytest

from helpers.commands import inspect_json, score, write_jsonl
from helpers.language_models import needs_hf, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_planned_rows_are_those_that_a_run_computes(tmp_path, capsys, kind):
    """transformers' models give hidden states padded, so a long sequence may not meet many short ones."""
    needs_hf()
    model = tmp_path / "model"
    tiny_model(kind, max_position_embeddings=256).save_pretrained(model)
    tiny_tokenizer(adds_bos=True).save_pretrained(model)
    questions = [{"context": "the sea " * 50, "choices": [" is"]}]
    questions += [{"context": f"the river {number}", "choices": [" is", " flows"]} for number in range(40)]
    file = write_jsonl(tmp_path / "q.jsonl", questions)
    planned = []
    for budget in (100, 130, 400):
        summary = inspect_json(capsys, "--model", model, "--token-budget", budget, file)
        batches = next(batches for batches in summary["batches"] if "max_rows" in batches)
        planned.append((batches["planned"]["batches"], batches["planned"]["rows"]))
        assert score(model, "--token-budget", budget, file) == 0
        rows = re.search(r"as ([\d,]+) rows", capsys.readouterr().err).group(1)
        assert planned[-1][1] == int(rows.replace(",", ""))
    # The limit on padding shows.
    assert (planned[-1][0] == 1) == (kind == "Qwen3")
