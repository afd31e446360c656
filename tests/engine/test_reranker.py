"""Reranker against sentence-transformers' rank and predict, and against transformers one pair at a time."""

import pytest
import torch

from helpers.language_models import needs_hf, reranking_tokenizer, tiny_model, transformers
from radix_ops.engine import Reranker, Template, UserError

QUERY = "Which river flows through Paris?"
DOCUMENTS = ["the Seine", "the sea is saltier than the river", "the Rhine", "the sea is saltier than the river", "x"]
TEMPLATE = Template("Query: {query}\nDocument: {document}\nRelevant:", yes=" river", no=7)


def cross_encoder(kind="Qwen3"):
    needs_hf()
    config = tiny_model(kind).config
    config.num_labels, config.pad_token_id = 1, 1
    torch.manual_seed(1)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


@pytest.fixture(scope="module", params=["Qwen3", "Llama"])
def saved(request, tmp_path_factory):
    """Return a folder of a cross-encoder and sentence-transformers' model of it."""
    library = pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("cross")
    cross_encoder(request.param).save_pretrained(folder)
    reranking_tokenizer().save_pretrained(folder)
    return folder, library.CrossEncoder(str(folder), device="cpu")


def test_ranks_are_those_of_sentence_transformers(saved):
    folder, library = saved
    documents = DOCUMENTS[:3] + DOCUMENTS[4:]  # equal ones may come in any order there
    expected = library.rank(QUERY, documents, batch_size=1)
    found = Reranker(folder, device="cpu").rank(QUERY, documents)
    assert [entry["corpus_id"] for entry in found] == [entry["corpus_id"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([float(e["score"]) for e in expected], abs=2e-5)
    assert all(set(entry) == {"corpus_id", "score"} for entry in found)
    best = Reranker(folder, device="cpu").rank(QUERY, documents, top_k=2, return_documents=True)
    assert [(e["corpus_id"], e["text"]) for e in best] == [
        (e["corpus_id"], e["text"]) for e in library.rank(QUERY, documents, top_k=2, return_documents=True)
    ]


def test_scores_of_many_queries_are_predictions_of_sentence_transformers(saved):
    folder, library = saved
    queries = [{"query": QUERY[n:], "documents": DOCUMENTS[n:], "id": n} for n in range(4)]
    reranker = Reranker(folder, device="cpu")
    for results in (reranker.score(queries), list(reranker.stream(iter(queries), window=3))):
        for query, found in zip(queries, results, strict=True):
            expected = library.predict([(query["query"], document) for document in query["documents"]], batch_size=1)
            assert found["scores"] == pytest.approx(expected.tolist(), abs=2e-5)
            assert found["order"] == sorted(range(len(found["scores"])), key=lambda i: -found["scores"][i])
            assert found["id"] == query["id"]
            assert set(found) == {"id", "scores", "order"}
    assert reranker.score([]) == []


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
@pytest.mark.parametrize("plain", [False, True])
def test_a_loaded_language_model_answers_in_a_template(kind, plain):
    needs_hf()
    model, tokenizer = tiny_model(kind, max_position_embeddings=256), reranking_tokenizer()
    yes = tokenizer.encode(" river", add_special_tokens=False)
    expected = []
    for document in DOCUMENTS:
        parts = (f"Query: {QUERY}\nDocument: {document}", "\nRelevant:")
        ids = [token for text in parts for token in tokenizer.encode(text, add_special_tokens=False)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        expected.append(logits[[*yes, 7]].softmax(0)[0].item())
    found = Reranker(model, tokenizer, template=TEMPLATE, plain=plain).score(
        [{"query": QUERY, "documents": tuple(DOCUMENTS)}]
    )
    assert found[0]["scores"] == pytest.approx(expected, abs=2e-5)


def test_a_loaded_cross_encoder_scores_pairs():
    model, tokenizer = cross_encoder(), reranking_tokenizer()
    found = Reranker(model, tokenizer).rank(QUERY, DOCUMENTS)
    scores = {entry["corpus_id"]: entry["score"] for entry in found}
    for index, document in enumerate(DOCUMENTS):
        with torch.no_grad():
            logit = model(**tokenizer(QUERY, document, return_tensors="pt")).logits[0, 0]
        assert scores[index] == pytest.approx(logit.sigmoid().item(), abs=2e-5)
    # Equal documents keep their order.
    assert [entry["corpus_id"] for entry in found if entry["corpus_id"] in (1, 3)] == [1, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, DOCUMENTS), 'rank: "query" is a number; it must be a string'),
        ((QUERY, "the sea"), "documents must be a list of strings, got str"),
        ((QUERY, ["a", None]), r"rank: documents\[1\] is null; it must be a string"),
        ((QUERY, ["a", {"title": "b"}]), r'rank: documents\[1\] has no "text" \(a string\); it has "title"'),
        ((QUERY, [{"text": "a", "title": 1}]), r'rank: documents\[0\]: "title" is a number; it must be a string'),
        (
            (QUERY, [{"text": "a", "id": [1]}]),
            r'rank: documents\[0\]: "id" is an array; it must be a string or a whole',
        ),
        ((QUERY, ["a", {"text": "a", "id": 1}]), r"rank: documents\[0\] has no id, and others have one"),
        (
            (QUERY, [{"text": "a", "id": "1"}, {"text": "b", "id": 1}]),
            r"rank: documents\[1\] has the id 1 of documents\[0\]",
        ),
        ((QUERY, ["a", "the sea " * 200]), r"rank: documents\[1\] takes \d+ tokens .*; truncate_right=True drops tok"),
    ],
)
def test_what_cannot_be_ranked_is_named_before_the_model_runs(monkeypatch, arguments, message):
    reranker = Reranker(cross_encoder(), reranking_tokenizer())
    monkeypatch.setattr(reranker.runner, "logits", lambda sequences: pytest.fail("the model ran"))
    with pytest.raises(UserError, match=message):
        reranker.rank(*arguments)
    with pytest.raises(UserError, match="top_k must be a whole number from 1"):
        reranker.rank(QUERY, DOCUMENTS, top_k=0)
    with pytest.raises(UserError, match=r'rank has an "instruction", which a cross-encoder does not take; a template'):
        reranker.rank(QUERY, DOCUMENTS, instruction="a")


def test_models_that_cannot_rank_are_refused(tmp_path):
    tokenizer = reranking_tokenizer()
    with pytest.raises(
        UserError, match="is a language model of type llama, which has no template .* by template, qwen"
    ):
        Reranker(tiny_model(), tokenizer)
    with pytest.raises(UserError, match="template pairs says how a cross-encoder reads, and model LlamaForCausalLM is"):
        Reranker(tiny_model(), tokenizer, template="pairs")
    with pytest.raises(UserError, match="is neither qwen3-reranker nor a file"):
        Reranker(tiny_model(), tokenizer, template=tmp_path / "none.json")
    model = cross_encoder()
    model.config.num_labels = 3
    with pytest.raises(UserError, match="has a classification head of 3 labels; rerank needs one of 1"):
        Reranker(model, tokenizer)
    with pytest.raises(UserError, match="`radix-ops classify` gives each label's probability"):
        Reranker(model, tokenizer)


def objects(texts=DOCUMENTS, **fields):
    return [{"id": f"d{n}", "text": text, **fields} for n, text in enumerate(texts)]


def test_a_title_stands_before_the_text_as_in_beir():
    model, tokenizer = cross_encoder(), reranking_tokenizer()
    reranker = Reranker(model, tokenizer)
    documents = [{"title": "the sea", "text": " is salty "}, {"title": "", "text": " a"}, {"title": None, "text": " a"}]
    # Rerank of BEIR: (corpus[doc_id].get("title", "") + " " + corpus[doc_id].get("text", "")).strip()
    joined = ["the sea  is salty", "a", " a"]
    (found,) = reranker.score([{"query": QUERY, "documents": documents}])
    for text, score in zip(joined, found["scores"], strict=True):
        with torch.no_grad():
            logit = model(**tokenizer(QUERY, text, return_tensors="pt")).logits[0, 0]
        assert score == pytest.approx(logit.sigmoid().item(), abs=2e-5)


def test_ids_and_texts_come_in_the_order_of_scores_and_top_k_cuts_them():
    model, tokenizer = cross_encoder(), reranking_tokenizer()
    (whole,) = Reranker(model, tokenizer).score([{"query": QUERY, "documents": DOCUMENTS}])
    line = {"query": QUERY, "documents": objects(url="copied to nowhere"), "query_id": "q"}
    (found,) = Reranker(model, tokenizer, top_k=3, return_documents=True).score([line])
    best = whole["order"][:3]
    assert found == {
        "query_id": "q", "scores": whole["scores"], "order": best, "ids": [f"d{n}" for n in best],
        "texts": [DOCUMENTS[n] for n in best],
    }  # fmt: skip
    ranked = Reranker(model, tokenizer).rank(QUERY, line["documents"], top_k=2, return_documents=True)
    assert [list(entry) for entry in ranked] == [["corpus_id", "score", "id", "text"]] * 2
    assert [(e["corpus_id"], e["id"], e["text"]) for e in ranked] == [(n, f"d{n}", DOCUMENTS[n]) for n in best[:2]]
    with pytest.raises(UserError, match='queries\\[0\\] has the key "ids", which the output uses itself'):
        Reranker(model, tokenizer).score([{**line, "ids": 1}])
    with pytest.raises(UserError, match='queries\\[0\\] has the key "texts", which the output uses itself'):
        Reranker(model, tokenizer, return_documents=True).score([{**line, "texts": 1}])
    (found,) = Reranker(model, tokenizer).score([{"query": QUERY, "documents": DOCUMENTS, "ids": 1, "texts": 2}])
    assert (found["ids"], found["texts"]) == (1, 2)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_no_documents_are_an_empty_result(template):
    """Between others, at both ends, alone, in a stream, and where nothing at all is left to compute."""
    model = tiny_model("Qwen3", max_position_embeddings=256) if template else cross_encoder()
    reranker = Reranker(model, reranking_tokenizer(), template=template)
    empty = {"query": QUERY, "documents": [], "id": 1}
    whole = {"query": QUERY, "documents": DOCUMENTS}
    (alone,) = reranker.score([whole])
    nothing = {"id": 1, "scores": [], "order": []}
    assert reranker.score([empty]) == [nothing]
    assert reranker.score([empty, empty, whole, empty, whole, empty]) == [
        nothing,
        nothing,
        alone,
        nothing,
        alone,
        nothing,
    ]
    assert list(reranker.stream(iter([empty, whole, empty]), window=1)) == [nothing, alone, nothing]
    assert reranker.rank(QUERY, []) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relevance": 1}, '"relevance" is a number; it must be an array of whole numbers, one for each document'),
        ({"relevance": [1]}, '"relevance" has 1 numbers, and there are 2 documents'),
        ({"relevance": [1, 0.5]}, '"relevance"\\[1\\] is 0.5; it must be a whole number'),
        ({"relevance": [1, 10**9]}, '"relevance"\\[1\\] is 1000000000; it must be a whole number, 1,000,000 at most'),
        ({"relevance": [1, float("nan")]}, '"relevance"\\[1\\] is nan; it must be a whole number'),
        ({"relevance": [1, True]}, '"relevance"\\[1\\] is a boolean; it must be a whole number'),
        ({"query_id": 1.5}, '"query_id" is a number; it must be a string or a whole number'),
    ],
)
def test_relevance_that_cannot_be_used_is_named(fields, message):
    reranker = Reranker(cross_encoder(), reranking_tokenizer())
    with pytest.raises(UserError, match=message):
        reranker.score([{"query": QUERY, "documents": ["a", "b"], **fields}])
