"""How the benchmark of decisions counts answers."""

import json
import sys
from pathlib import Path

import pytest

from helpers.language_models import tiny_model, tiny_tokenizer
from radix_ops.data.records import Records
from radix_ops.engine.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_decisions

    return bench_decisions


def result(*logprobs: float, best_per_char: int = 0, gold: int | None = None) -> dict:
    best = max(range(len(logprobs)), key=logprobs.__getitem__)
    found = {"logprobs": list(logprobs), "best": best, "best_per_char": best_per_char}
    return found if gold is None else found | {"gold": gold}


def test_answers_are_counted_against_plain_float32_and_the_right_ones(bench):
    exact = [result(-1.0, -2.0), result(-1.0, -2.0, best_per_char=1), result(-3.0, -1.0)]
    plain = [result(-1.0, -2.0), result(-1.0, -1.5, best_per_char=1), result(-1.0, -1.25)]
    found = [result(-1.0, -2.0, gold=1), result(-1.5, -1.25, gold=1), result(-1.5, -1.25, gold=1)]
    row = bench.compare(found, plain, exact)
    assert row == {
        "differ, sum": 2,
        "differ, per character": 1,
        "margin": 0.5,  # of the second question in plain, whose third had 0.25
        "from float32, sum": 1,
        "from float32, per character": 1,
        "mean difference": pytest.approx((0.5 + 0.25 + 0.5) / 6),
        "largest difference": 0.5,
        "mean error": pytest.approx((0.5 + 0.75 + 1.5 + 0.25) / 6),
        "largest error": 1.5,
        "right, sum": 2,
        "right, per character": 0,
    }
    assert bench.compare(plain, plain, exact)["margin"] is None
    assert bench.compare(plain, plain, exact)["right, sum"] is None


def test_no_answer_is_right_or_wrong_where_none_is_known(bench):
    assert bench.right([result(-1.0, -2.0)], "best") is None
    assert bench.right([result(-1.0, -2.0), result(-1.0, -2.0, gold=1)], "best") == 0


def test_items_that_have_no_answers_are_named(bench, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a river"}\n')
    with pytest.raises(UserError, match='texts.jsonl, line 1 has no "context"'):
        list(Records(tmp_path / "texts.jsonl", bench.question))


def test_all_ways_answer_the_questions_of_a_file(bench, tmp_path, monkeypatch, capsys):
    tiny_model(max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer(adds_bos=False).save_pretrained(tmp_path / "model")
    asked = tmp_path / "questions.jsonl"
    lines = [
        {"context": f"Q: Is the river number {i} long?\nA:", "choices": [" yes", " no, it is short"], "gold": i % 2}
        for i in range(6)
    ]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--model", str(tmp_path / "model"), "--questions", str(asked), "--device", "cpu", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_decisions.py", *options])
    reported = {}
    monkeypatch.setattr(
        bench.harness, "report", lambda name, rows, save, measured: reported.update(name=name, rows=rows)
    )
    bench.main()
    rows = {row["way"]: row for row in reported["rows"]}
    assert list(rows) == ["plain", "plain, smaller batches", "plain, one at a time", "compact", "trie"]
    assert rows["plain"]["differ, sum"] == rows["plain"]["largest difference"] == 0
    # Random weights are far from ties, so that rounding decides nothing.
    assert all(row["questions"] == 6 and row["largest difference"] < 0.5 for row in rows.values())
    assert rows["trie"]["rows"] == rows["compact"]["rows"] < rows["plain, one at a time"]["rows"]
