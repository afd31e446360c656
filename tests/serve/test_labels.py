"""The routes of a Classifier against transformers' text-classification pipeline."""

import pytest

from helpers.language_models import TEXT, needs_hf, tiny_classifier, tiny_tokenizer, transformers
from helpers.serving import served
from radix_ops.engine import Classifier

TEXTS = [TEXT[0], TEXT[0] + " " + TEXT[1], "x"]


@pytest.fixture(scope="module", params=["single_label_classification", "multi_label_classification"])
def folder(request, tmp_path_factory):
    needs_hf()
    path = tmp_path_factory.mktemp("classifier")
    tiny_classifier(problem_type=request.param).save_pretrained(path)
    tokenizer = tiny_tokenizer(True)
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def client(folder):
    with served(Classifier(folder, device="cpu", lazy=True)) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline(folder):
    return transformers.pipeline("text-classification", str(folder), device="cpu", top_k=None)


def scores_of(entries):
    return {entry["label"]: entry["score"] for entry in entries}


def test_teis_predictions_are_those_of_the_pipeline(client, pipeline):
    found = client.ask("/predict", inputs=[[text] for text in TEXTS])
    for entries, expected in zip(found, pipeline(TEXTS), strict=True):
        assert [entry["label"] for entry in entries] == [entry["label"] for entry in expected]
        assert scores_of(entries) == pytest.approx(scores_of(expected), abs=2e-6)
    one = client.ask("/predict", inputs=TEXTS[0])
    assert scores_of(one) == pytest.approx(scores_of(found[0]), abs=2e-6)
    (pair,) = client.ask("/predict", inputs=[[TEXTS[0], "the sea"]])
    expected = pipeline([{"text": TEXTS[0], "text_pair": "the sea"}])[0]
    assert scores_of(pair) == pytest.approx(scores_of(expected), abs=2e-6)
    raw = client.ask("/predict", inputs=[[TEXTS[0]]], raw_scores=True)
    assert scores_of(raw[0]) == pytest.approx(scores_of(pipeline(TEXTS[:1], function_to_apply="none")[0]), abs=2e-5)


def test_vllms_probabilities_are_in_the_labels_order(client, pipeline):
    found = client.ask("/classify", input=TEXTS)
    pooled = client.ask("/pooling", input=TEXTS)
    for entry, other, expected in zip(found["data"], pooled["data"], pipeline(TEXTS), strict=True):
        scores = scores_of(expected)
        assert entry["probs"] == pytest.approx([scores[label] for label in "abc"], abs=2e-6)
        assert (entry["label"], entry["num_classes"]) == (max(scores, key=scores.get), 3)
        assert other["data"] == pytest.approx(entry["probs"], abs=2e-6)
    count = sum(len(pipeline.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}


def test_hugging_faces_api_gets_a_list_for_each_input(client, pipeline):
    (entries,) = client.ask("/", inputs=TEXTS[0], parameters={"top_k": 2})
    assert scores_of(entries) == pytest.approx(scores_of(pipeline(TEXTS[:1])[0][:2]), abs=2e-6)
    (raw,) = client.ask("/", inputs=TEXTS[0], parameters={"function_to_apply": "none"})
    assert scores_of(raw) == pytest.approx(scores_of(pipeline(TEXTS[:1], function_to_apply="none")[0]), abs=2e-5)
    own = "softmax" if client.app.state.server.engine.problem_type.startswith("single") else "sigmoid"
    other = {"softmax": "sigmoid", "sigmoid": "softmax"}[own]
    assert client.post("/", {"inputs": "x", "parameters": {"function_to_apply": own}}).status_code == 200
    assert client.post("/", {"inputs": "x", "parameters": {"function_to_apply": other}}).status_code == 422


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ([], 400, "inputs is an empty array"),
        ([["a", "b", "c"]], 422, "inputs[0] is an array of something else; it must be an array of one string or two"),
        ([["a"], "b"], 422, "inputs[1] is a string; it must be an array of one string or two"),
        ({"a": 1}, 422, "inputs is an object"),
        ("x " * 400, 413, "inputs takes"),
    ],
)
def test_what_cannot_be_classified_is_refused_in_teis_shape(client, given, status, said):
    found = client.post("/predict", {"inputs": given})
    assert found.status_code == status
    assert found.json()["error"].startswith(said)
