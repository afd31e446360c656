"""Accuracy, precision, recall and F1 of labels, against scikit-learn."""

import random

import pytest

import radix_ops.engine
from radix_ops.engine import UserError

metrics = pytest.importorskip("sklearn.metrics")
LABELS = ["a", "b", "c", "d", "never"]


def found_of(results):
    return radix_ops.engine.metrics({"labels": LABELS, "scores": [0.2] * 5, **result} for result in results)


def test_labels_of_rows_that_have_one():
    draw = random.Random(0)
    rows = [{"gold": draw.choice("abc"), "best": draw.choice("aabd")} for _ in range(200)]
    found = found_of([*rows, {"gold": None, "best": "a"}, {"best": "b"}])
    right, best = [row["gold"] for row in rows], [row["best"] for row in rows]
    assert (found["rows"], found["rows_with_gold"]) == (202, 200)
    assert found["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(right, best))
    check(found, right, best, list("abcd"))


def check(found, right, predicted, names, **options):
    assert list(found["labels"]) == names
    each = metrics.precision_recall_fscore_support(right, predicted, zero_division=0, average=None, **options)
    macro = metrics.precision_recall_fscore_support(right, predicted, zero_division=0, average="macro", **options)
    for place, label in enumerate(names):
        got = found["labels"][label]
        assert (got["precision"], got["recall"], got["f1"]) == pytest.approx([part[place] for part in each[:3]])
        assert got["rows"] == each[3][place]
    assert tuple(found["macro"].values()) == pytest.approx(macro[:3])


def test_labels_of_rows_that_may_have_several():
    draw = random.Random(1)
    rows = [
        {
            "gold": draw.sample("abc", draw.randint(0, 3)),
            "predicted": draw.sample("abd", draw.randint(0, 2)),
            "best": "a",
        }
        for _ in range(200)
    ]
    found = found_of(rows)
    right, predicted = ([[label in row[key] for label in LABELS] for row in rows] for key in ("gold", "predicted"))
    assert found["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(right, predicted))
    check(found, right, predicted, list("abcd"), labels=range(4))


def test_rows_without_right_labels_say_nothing():
    assert found_of([{"best": "a"}]) == {"rows": 1, "rows_with_gold": 0}
    assert found_of([{"gold": [], "predicted": [], "best": "a"}])["accuracy"]["value"] == 1


def test_results_of_another_kind_are_named():
    labelled, scored = (
        {"labels": ["a"], "best": "a"},
        {"logprobs": [-1.0], "tokens": [1], "best": 0, "best_per_char": 0},
    )
    for results in ([labelled, scored], [scored, labelled], [labelled, {"labels": ["a"], "gold": 3}], [3]):
        with pytest.raises(UserError, match=r"results\[\d\] is no result of a (Scorer|Classifier), or not of the kind"):
            radix_ops.engine.metrics(results)
    with pytest.raises(UserError, match="calibration=True is for results of a Scorer, and these are of a Classifier"):
        radix_ops.engine.metrics([labelled], calibration=True)
