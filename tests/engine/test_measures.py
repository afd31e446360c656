"""metrics: accuracy, its interval, calibration and perplexities, against scipy, lm-evaluation-harness and NumPy."""

import itertools
import json
import math

import numpy as np
import pytest

from radix_ops.engine import UserError, metrics
from radix_ops.engine.intervals import wilson_interval

ANSWERS = ("sum", "per_token", "per_char")


def random_results(seed: int, count: int, with_gold=lambda number: True):
    """Return results of questions with the texts of their choices, which no result holds."""
    rng = np.random.default_rng(seed)
    results, choices = [], []
    for number in range(count):
        size = int(rng.integers(2, 6))
        texts = [" " + "abcdefghij"[: rng.integers(1, 10)] * int(rng.integers(1, 4)) for _ in range(size)]
        tokens = rng.integers(1, 9, size)
        logprobs = -rng.exponential(1.0, size) * tokens
        lengths = [len(text.lstrip()) for text in texts]
        result = {
            "logprobs": logprobs.tolist(),
            "tokens": tokens.tolist(),
            "greedy": [False] * size,
            "best": int(logprobs.argmax()),
            "best_per_char": int((logprobs / lengths).argmax()),
        }
        if with_gold(number):
            result["gold"] = int(rng.integers(0, size))
        results.append(result)
        choices.append([text.lstrip() for text in texts])
    return results, choices


@pytest.mark.parametrize("count", [1, 2, 10, 997])
def test_the_interval_is_scipys_wilson_interval(count):
    stats = pytest.importorskip("scipy.stats")
    for correct in {0, 1, count // 3, count - 1, count}:
        wanted = stats.binomtest(correct, count).proportion_ci(0.95, method="wilson")
        assert wilson_interval(correct, count) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
        low, high = wilson_interval(correct, count)
        assert 0 <= low <= correct / count <= high <= 1


def test_accuracies_are_those_of_lm_evaluation_harness():
    task = pytest.importorskip("lm_eval.api.task", exc_type=ImportError).ConfigurableTask
    results, choices = random_results(0, 300)
    harness = object.__new__(task)
    harness.OUTPUT_TYPE, harness.multiple_input, harness.multiple_target = "multiple_choice", 0, 0
    harness._metric_fn_list = {"acc": None, "acc_norm": None}
    harness._config = type("Config", (), {"process_results": None})()
    harness.doc_to_choice, harness.doc_to_target = lambda doc: doc["choices"], lambda doc: doc["gold"]
    found = [
        harness.process_results({"choices": texts, "gold": result["gold"]}, [(x, False) for x in result["logprobs"]])
        for result, texts in zip(results, choices, strict=True)
    ]
    accuracy = metrics(results)["accuracy"]
    assert accuracy["sum"]["value"] == pytest.approx(np.mean([row["acc"] for row in found]))
    assert accuracy["per_char"]["value"] == pytest.approx(np.mean([row["acc_norm"] for row in found]))
    per_token = [np.argmax(np.divide(r["logprobs"], r["tokens"])) == r["gold"] for r in results]
    assert accuracy["per_token"]["correct"] == sum(per_token)
    assert len({accuracy[name]["correct"] for name in ANSWERS}) == 3


def test_rows_without_gold_are_told_and_not_counted():
    results, _ = random_results(1, 90, with_gold=lambda number: number % 3)
    results[0]["gold"] = None
    found = metrics(results)
    assert (found["rows"], found["rows_with_gold"]) == (90, 60)
    right = [r["best"] == r["gold"] for r in results if r.get("gold") is not None]
    assert found["accuracy"]["sum"]["correct"] == sum(right)
    assert found["accuracy"]["sum"]["value"] == sum(right) / 60
    assert found["interval"] == {"method": "Wilson score", "level": 0.95}
    assert metrics([{k: v for k, v in r.items() if k != "gold"} for r in results]) == {"rows": 90, "rows_with_gold": 0}
    assert metrics([]) == {"rows": 0, "rows_with_gold": 0}


def brute_force_calibration(results, bins=10):
    rows = []
    for result in results:
        exps = [math.exp(value) for value in result["logprobs"]]
        rows.append((max(exps) / sum(exps), result["best"] == result["gold"]))
    table, error = [], 0.0
    for number in range(bins):
        held = [row for row in rows if number / bins < row[0] <= (number + 1) / bins]
        if held:
            confidence, accuracy = (sum(row[i] for row in held) / len(held) for i in (0, 1))
            table.append((number / bins, (number + 1) / bins, len(held), confidence, accuracy))
            error += len(held) / len(rows) * abs(confidence - accuracy)
    return table, error


def test_calibration_is_that_of_each_bin_by_hand():
    results, _ = random_results(2, 400)
    # Confidences that are bounds of bins: two equal choices, and a certain answer.
    edge = {"tokens": [1, 1], "greedy": [False, False], "best": 0, "best_per_char": 0}
    results += [{**edge, "logprobs": [-1.0, -1.0], "gold": 1}, {**edge, "logprobs": [-0.5, -800.0], "gold": 0}]
    found, (table, error) = metrics(results, calibration=True)["calibration"], brute_force_calibration(results)
    assert len(table) >= 6
    assert [(b["above"], b["up_to"], b["answers"]) for b in found["bins"]] == [row[:3] for row in table]
    assert [(b["confidence"], b["accuracy"]) for b in found["bins"]] == [pytest.approx(row[3:]) for row in table]
    assert found["expected_calibration_error"] == pytest.approx(error)
    assert "calibration" not in metrics(results)


def text_results(texts):
    return [
        {"logprob": -1.5 * len(text), "tokens": len(text.split()), "words": len(text.split(" ")), "bytes": len(text)}
        for text in texts
    ]


def test_perplexities_are_those_of_lm_evaluation_harness():
    harness = pytest.importorskip("lm_eval.api.metrics", exc_type=ImportError)
    results = text_results(["the river and the sea", "x", "a b c d e f g", "some words"])
    found = metrics(results)
    assert found["rows"] == 4
    for name in ("token", "word", "byte"):
        pairs = [(r["logprob"], r[f"{name}s"]) for r in results]
        assert found[f"{name}_perplexity"] == pytest.approx(harness.weighted_perplexity(pairs))
    bits = harness.bits_per_byte([(r["logprob"], r["bytes"]) for r in results])
    assert found["bits_per_byte"] == pytest.approx(bits)


def test_what_no_float_holds_and_what_counts_nothing_is_null():
    nothing = {"logprob": 0.0, "tokens": 0, "words": 1, "bytes": 0}
    found = metrics([nothing])
    assert found["token_perplexity"] is found["byte_perplexity"] is found["bits_per_byte"] is None
    found = metrics([{"logprob": -5000.0, "tokens": 1000, "words": 1, "bytes": 3000}])
    assert found["word_perplexity"] is None
    assert found["token_perplexity"] == pytest.approx(math.exp(5))
    json.dumps(found, allow_nan=False)


def test_the_order_of_results_does_not_matter():
    """A resumed run reads those that it finds first."""
    results, _ = random_results(3, 60)
    assert metrics(results[::-1], calibration=True) == metrics(results, calibration=True)
    texts = text_results(["the", "sea", "and", "the", "river", "and", "the", "hill"])
    texts = [{**r, "logprob": r["logprob"] / 3} for r in texts]
    for order in itertools.islice(itertools.permutations(texts), 50):
        assert metrics(order) == metrics(texts)


GOOD = {"logprobs": [-1.0, -2.0], "tokens": [1, 1], "greedy": [True, False], "best": 0, "best_per_char": 0, "gold": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"scores": [1.0]},
        {**GOOD, "gold": 2},
        {**GOOD, "gold": "A"},
        {**GOOD, "gold": True},
        {**GOOD, "logprobs": "x"},
        {"logprob": -1.0, "tokens": 1, "words": 1, "bytes": 1},
        "text",
    ],
)
def test_what_is_no_result_is_named(wrong):
    with pytest.raises(UserError, match=r"results\[1\] is no result of a Scorer, or not of the kind before it"):
        metrics([GOOD, wrong])


def test_calibration_needs_gold():
    with pytest.raises(UserError, match='calibration=True needs results with "gold"'):
        metrics([{k: v for k, v in GOOD.items() if k != "gold"}], calibration=True)
