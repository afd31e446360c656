"""Classifier with classification heads, against transformers' text-classification pipeline and its model row by row."""

import json

import numpy as np
import pytest
import torch

from helpers.language_models import TEXT, needs_hf, tiny_classifier, tiny_model, tiny_tokenizer, transformers
from radix_ops.engine import Classifier, UserError

needs_hf()
TEXTS = [
    {"text": TEXT[0], "id": 7},
    {"text": TEXT[0] + " " + TEXT[1]},
    {"text": TEXT[0] + " " + TEXT[2], "text_pair": "the sea"},
    {"text": TEXT[0] + " " + TEXT[2], "text_pair": ""},
    {"text": "x"},
    {"text": "the sea", "text_pair": TEXT[1]},
    {"text": TEXT[0], "note": {"of": [1, None]}},
]
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def saved(folder, model, adds_bos=True):
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer(adds_bos)
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(folder)
    return folder


def by_pipeline(folder, rows, **options):
    """Return {label: score} of each row, called by itself."""
    call = transformers.pipeline("text-classification", str(folder), device="cpu", top_k=None, **options)
    rows = [{key: row[key] for key in ("text", "text_pair") if key in row} for row in rows]
    return [{found["label"]: found["score"] for found in call(row)} for row in rows]


def check(results, expected, rows=TEXTS):
    assert len(results) == len(rows)
    for found, scores, row in zip(results, expected, rows, strict=True):
        assert dict(zip(found["labels"], found["scores"], strict=True)) == pytest.approx(scores, abs=2e-5)
        assert found["scores"] == sorted(found["scores"], reverse=True)
        assert {key: found.get(key) for key in row if key not in ("text", "text_pair")} == {
            key: value for key, value in row.items() if key not in ("text", "text_pair")
        }
    spread = np.array([list(scores.values()) for scores in expected])
    assert np.ptp(spread, axis=0).min() > 0.01  # scores that all lie together would tell nothing


@pytest.mark.parametrize("options", [{}, {"plain": True}, {"token_budget": 40}, {"layout": "unfold"}], ids=str)
@pytest.mark.parametrize(
    ("kind", "labels", "problem"),
    [
        ("Qwen3", 3, None),
        ("Llama", 3, SINGLE),
        ("Llama", 5, MULTI),
        ("Qwen3", 1, None),
        ("Llama", 1, MULTI),
        ("Qwen3", 1, REGRESSION),
        ("Llama", 2, REGRESSION),
    ],
)
def test_scores_are_those_of_the_pipeline(tmp_path, kind, labels, problem, options):
    folder = saved(tmp_path, tiny_classifier(kind, labels, problem_type=problem))
    expected = by_pipeline(folder, TEXTS)
    classifier = Classifier(folder, device="cpu", **options)
    assert classifier.labels == list("abcde"[:labels])
    results = classifier.classify(TEXTS)
    check(results, expected)
    for found, scores in zip(results, expected, strict=True):
        assert ("best" in found) == (problem != REGRESSION)
        assert found.get("best") in (None, max(scores, key=scores.get))
        if "predicted" in found:
            assert set(found["predicted"]) == {label for label, score in scores.items() if score >= 0.5}
        assert ("predicted" in found) == (classifier.problem_type == MULTI)
    check(list(classifier.stream(iter(TEXTS), window=3)), expected)


@pytest.mark.parametrize("options", [{}, {"plain": True}], ids=str)
@pytest.mark.parametrize("kind", ["Qwen3", "Llama", "GPT2"])
def test_a_model_without_a_padding_token_is_called_as_row_by_row(kind, options):
    if kind == "GPT2":
        torch.manual_seed(3)
        config = transformers.GPT2Config(
            vocab_size=340, n_embd=32, n_layer=2, n_head=4, n_positions=256, num_labels=3, initializer_range=0.3
        )
        model = transformers.GPT2ForSequenceClassification(config).eval()
        assert model.config.pad_token_id is None
    else:
        model = tiny_classifier(kind, pad_token_id=None)
    tokenizer = tiny_tokenizer(adds_bos=True)
    results = Classifier(model, tokenizer, **options).classify(TEXTS)
    expected = []
    for row in TEXTS:
        pair = (row["text"], row["text_pair"]) if "text_pair" in row else (row["text"],)
        with torch.no_grad():
            logits = model(tokenizer(*pair, return_tensors="pt")["input_ids"]).logits[0].double()
        expected.append(dict(zip(model.config.id2label.values(), logits.softmax(0).tolist(), strict=True)))
    check(results, expected)


def test_a_text_that_ends_in_the_padding_token_is_read_as_row_by_row(tmp_path):
    """The head then reads the token before it, in a batch and alone."""
    model, tokenizer = tiny_classifier(), tiny_tokenizer(adds_bos=False)
    rows = [{"text": text + end} for text in TEXT for end in ("", "</s>", "</s></s>")]
    tokenizer.pad_token = "</s>"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    check(Classifier(tmp_path, device="cpu").classify(rows), by_pipeline(tmp_path, rows), rows)


def test_long_texts_are_refused_or_cut_as_the_pipeline_cuts_them(tmp_path):
    folder = saved(tmp_path, tiny_classifier())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.truncation_side = "left"
    with pytest.raises(UserError, match=r"items\[1\] takes \d+ tokens, and the most are 20; truncate_right=True drops"):
        Classifier(folder, device="cpu", max_length=20).classify([{"text": "x"}, *TEXTS])
    found = Classifier(folder, tokenizer, device="cpu", max_length=20, truncate_right=True).classify(TEXTS)
    assert tokenizer.truncation_side == "left"
    call = transformers.pipeline("text-classification", str(folder), device="cpu", top_k=None)
    options = {"truncation": True, "max_length": 20}
    rows = [{key: row[key] for key in ("text", "text_pair") if key in row} for row in TEXTS]
    expected = [{x["label"]: x["score"] for x in call(row, **options)} for row in rows]
    for result, scores in zip(found, expected, strict=True):
        assert dict(zip(result["labels"], result["scores"], strict=True)) == pytest.approx(scores, abs=2e-5)
    with pytest.raises(UserError, match="max_length 300 is more than the model reads, 256"):
        Classifier(folder, device="cpu", max_length=300)


def test_the_best_labels_alone_are_kept_and_a_threshold_decides(tmp_path):
    folder = saved(tmp_path, tiny_classifier("Llama", 5, problem_type=MULTI))
    whole = Classifier(folder, device="cpu").classify(TEXTS)
    first, second = sorted(found["scores"][2] for found in whole)[2:4]
    least = (first + second) / 2
    assert second - first > 1e-3
    for found, all_of_it in zip(
        Classifier(folder, device="cpu", top_k=2, threshold=least).classify(TEXTS), whole, strict=True
    ):
        assert found["labels"] == all_of_it["labels"][:2]
        assert found["scores"] == pytest.approx(all_of_it["scores"][:2], abs=1e-6)
        pairs = zip(all_of_it["labels"], all_of_it["scores"], strict=True)
        assert found["predicted"] == [label for label, score in pairs if score >= least]
    one = Classifier(saved(tmp_path / "one", tiny_classifier()), device="cpu", top_k=9)
    assert all(len(found["labels"]) == 3 for found in one.classify(TEXTS))


def test_a_problem_that_the_config_does_not_say_may_be_said(tmp_path):
    folder = saved(tmp_path, tiny_classifier())
    for problem, function in ((MULTI, "sigmoid"), (REGRESSION, "none"), (SINGLE, "softmax")):
        expected = by_pipeline(folder, TEXTS, function_to_apply=function)
        check(Classifier(folder, device="cpu", problem_type=problem).classify(TEXTS), expected)


@pytest.mark.parametrize(
    ("problem", "labels", "given", "gold"),
    [
        (None, 3, {"label": "b"}, "b"),
        (None, 3, {"label": 2}, "c"),
        (None, 3, {"label": 1.0}, "b"),
        (None, 3, {"label": np.int64(2)}, "c"),
        (None, 3, {"label": "b", "gold": 0}, "a"),
        (None, 3, {"label": "2"}, "c"),
        (None, 3, {"label": -1}, None),
        (None, 3, {"label": ""}, None),
        (None, 3, {"gold": None}, None),
        (None, 3, {"gold": None, "label": "b"}, "b"),
        (None, 3, {"gold": "", "label": "b"}, "b"),
        (None, 3, {}, None),
        (MULTI, 3, {"label": ["c", 0, "c"]}, ["a", "c"]),
        (MULTI, 3, {"gold": []}, []),
        (MULTI, 3, {"gold": "b"}, ["b"]),
        (None, 1, {"label": 1}, ["a"]),
        (None, 1, {"label": 0}, []),
        (REGRESSION, 1, {"label": 3.5}, None),
    ],
)
def test_right_labels_are_names_in_results(problem, labels, given, gold):
    classifier = Classifier(tiny_classifier(num_labels=labels, problem_type=problem), tiny_tokenizer(True))
    (found,) = classifier.classify([{"text": "a", **given}])
    assert found.get("gold") == gold
    assert ("gold" in found) == ("gold" in given or gold is not None)
    assert found.get("label") == given.get("label")


def test_an_index_that_is_another_labels_name_is_refused():
    model = tiny_classifier()
    model.config.id2label = {0: "1", 1: "2", 2: "3"}
    classifier = Classifier(model, tiny_tokenizer(True))
    assert classifier.classify([{"text": "a", "label": "1"}, {"text": "a", "label": 0}])[0]["gold"] == "1"
    with pytest.raises(
        UserError, match='items\\[0\\]: "label" is 1, and "1" is not the label of that index; write the'
    ):
        classifier.classify([{"text": "a", "label": 1}])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("abc", "items is a string; it must be a list"),
        ([{"text": 3}], r'items\[0\]: "text" is a number; it must be a string'),
        ([{"txt": "a"}], r'items\[0\] has no "text" \(a string\); it has "txt"'),
        ([{"text": "a", "text_pair": None}], r'items\[0\]: "text_pair" is null; it must be a string'),
        ([{"text": "a"}, {"text": "a", "best": 1}], r'items\[1\] has the key "best", which the output uses itself'),
        (
            [{"text": "a", "label": "d"}],
            r'items\[0\]: "label" is \'d\'; it must be a label \(\'a\', \'b\', \'c\'\) or its',
        ),
        (
            [{"text": "a", "gold": 3}],
            r'items\[0\]: "gold" is 3; it must be a label .* or its index, from 0 to 2; rename',
        ),
        ([{"text": "a", "gold": True}], r'items\[0\]: "gold" is True; it must be a label'),
        ([{"text": "a", "gold": ["a"]}], r"items\[0\]: \"gold\" is \['a'\]; it must be a label"),
        ([{"text": "a", "gold": 1.5}], r'items\[0\]: "gold" is 1.5; it must be a label'),
    ],
)
def test_items_that_cannot_be_used_are_named_before_the_model_runs(monkeypatch, items, message):
    classifier = Classifier(tiny_classifier(), tiny_tokenizer(True))
    monkeypatch.setattr(classifier.runner, "logits", lambda sequences: pytest.fail("the model ran"))
    with pytest.raises(UserError, match=message):
        classifier.classify(items)


def test_texts_of_no_tokens_are_refused():
    classifier = Classifier(tiny_classifier(), tiny_tokenizer(adds_bos=False))
    with pytest.raises(UserError, match=r"items\[1\] yields no tokens"):
        classifier.classify([{"text": "a"}, {"text": ""}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be a whole number from 1"),
        ({"threshold": 1.5}, "threshold must be a number from 0 to 1, or None, got 1.5"),
        ({"threshold": "a"}, "threshold must be a number from 0 to 1"),
        ({"threshold": 0.5}, "threshold is for models of which several labels may hold at once, .* is of single_label"),
        ({"problem_type": "multi"}, "problem_type must be one of single_label_classification, multi_label_class"),
        ({"template": "shieldgemma"}, "template is for language models, and model .* has a head of its own"),
        ({"template": 3}, "template must be a name, a file or a LabelPrompt, got 3"),
        ({"truncate_right": "no"}, "truncate_right must be True or False, got 'no'"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Classifier(tiny_classifier(), tiny_tokenizer(True), **options)


def test_heads_of_other_tasks_are_refused(tmp_path):
    model = tiny_model("Qwen3")
    token = transformers.Qwen3ForTokenClassification(model.config).eval()
    with pytest.raises(
        UserError, match="is a Qwen3ForTokenClassification, whose head labels each token; .* whole texts"
    ):
        Classifier(token, tiny_tokenizer(True))
    with pytest.raises(UserError, match="is a Qwen3ForTokenClassification, whose head labels each token"):
        Classifier(saved(tmp_path / "token", token), device="cpu")
    question = transformers.Qwen3ForQuestionAnswering(model.config).eval()
    with pytest.raises(UserError, match="is a Qwen3ForQuestionAnswering; radix-ops classify needs a SequenceClass"):
        Classifier(question, tiny_tokenizer(True))
    with pytest.raises(
        UserError, match="is a language model of type qwen3, which needs a prompt: name one by template"
    ):
        Classifier(model, tiny_tokenizer(True))


def test_configs_that_name_no_labels_are_refused(tmp_path):
    folder = saved(tmp_path, tiny_classifier())
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "id2label": {"0": "a", "1": "b", "2": "a"}}))
    with pytest.raises(UserError, match="id2label of its config has the name 'a' twice"):
        Classifier(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps({**fields, "id2label": {"0": "a", "1": "b", "5": "c"}}))
    with pytest.raises(UserError, match="id2label of its config must name the labels 0 to 2"):
        Classifier(folder, device="cpu")


def test_a_score_that_is_not_finite_is_an_error():
    model = tiny_classifier()
    model.score.weight.data[1] = float("nan")
    with pytest.raises(UserError, match=r"items\[0\]: label \"a\" got the score nan; try dtype float32"):
        Classifier(model, tiny_tokenizer(True)).classify([{"text": "a"}])


def test_shared_starts_are_computed_once(tmp_path):
    folder = saved(tmp_path, tiny_classifier())
    classifier = Classifier(folder, device="cpu")
    rows = [{"text": TEXT[0] + " " + str(number)} for number in range(20)]
    items = classifier.encode(classifier._parsed(rows, "rows", ""))
    stats = classifier.execute(items)
    assert stats.rows < 0.2 * stats.tokens


def test_token_ids_need_no_tokenizer(tmp_path):
    folder = saved(tmp_path / "whole", tiny_classifier())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{"input_ids": tokenizer(row["text"], row.get("text_pair") or None)["input_ids"]} for row in TEXTS]
    expected = Classifier(folder, device="cpu").classify(TEXTS)
    tiny_classifier().save_pretrained(tmp_path / "bare")
    bare = Classifier(tmp_path / "bare", device="cpu")
    for found, wanted in zip(bare.classify([{**row, "label": 1} for row in rows]), expected, strict=True):
        assert found["labels"] == wanted["labels"]
        assert found["scores"] == pytest.approx(wanted["scores"], abs=1e-6)
        assert (found["gold"], found["label"]) == ("b", 1)
    with pytest.raises(UserError, match='has "input_ids" and "text"; leave out the one that is not to be read'):
        bare.classify([{"input_ids": [3], "text": "a"}])
    with pytest.raises(
        UserError, match=r'items\[0\]: "input_ids"\[0\] is 340; the model\'s token ids are from 0 to 339'
    ):
        bare.classify([{"input_ids": [340]}])


def test_batches_that_do_not_fit_run_in_halves(tmp_path, monkeypatch, caplog):
    folder = saved(tmp_path, tiny_classifier())
    classifier = Classifier(folder, device="cpu")
    logits, sizes = classifier.runner.logits, []

    def small_logits(sequences):
        sizes.append(len(sequences))
        if len(sequences) > 2:
            raise torch.OutOfMemoryError("too much")
        return logits(sequences)

    monkeypatch.setattr(classifier.runner, "logits", small_logits)
    check(classifier.classify(TEXTS), by_pipeline(folder, TEXTS))
    assert max(sizes) > 2
    assert "out of memory: going on with batches of half the size" in caplog.text


def entailing(*names):
    """Return a classifier whose labels have these names."""
    model = tiny_classifier(num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    return Classifier(model, tiny_tokenizer(True))


NLI = {"premise": "the sea is salty", "hypothesis": "the river is not"}


def test_names_of_labels_may_differ_in_case():
    classifier = entailing("ENTAILMENT", "NEUTRAL", "CONTRADICTION")
    for given in ("contradiction", "Contradiction", "CONTRADICTION", 2, "2"):
        (found,) = classifier.classify([{**NLI, "label": given}])
        assert (found["gold"], found["label"]) == ("CONTRADICTION", given)
    classifier = entailing("a", "A", "b")
    assert [found["gold"] for found in classifier.classify([{"text": "x", "label": name} for name in "aAB"])] == [
        *"aAb"
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("contradiction", "entailment", "neutral"),
        ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"),
        ("entailment", "contradiction", "neutral"),
        ("not_entailment", "entailment"),
    ],
    ids=str,
)
def test_an_index_of_a_data_set_that_counts_labels_otherwise_is_refused(names):
    classifier = entailing(*names)
    with pytest.raises(UserError) as caught:
        classifier.classify([{**NLI, "label": 0}])
    assert f'items[0]: "label" is 0, and the label of that index is {names[0]!r} to the model; data sets of' in str(
        caught.value
    )
    assert "--column gold=label if the index is as the model counts" in caught.value.as_option
    rows = [{**NLI, "label": names[1].lower()}, {**NLI, "gold": 0}, {**NLI, "label": -1}]
    assert [found.get("gold") for found in classifier.classify(rows)] == [names[1], names[0], None]


def test_a_name_beside_an_index_must_be_that_of_the_model():
    classifier = entailing("negative", "positive")
    rows = [{"text": "a", "label": 1, "label_text": name} for name in ("positive", "POSITIVE", "good", None, 3)]
    assert [found["gold"] for found in classifier.classify(rows)] == ["positive"] * 5
    with pytest.raises(
        UserError, match="label of that index is 'negative' to the model, but \"label_text\" is 'Positive'"
    ):
        classifier.classify([{"text": "a", "label": 0, "label_text": "Positive"}])
