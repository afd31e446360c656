"""The routes of a Reranker against sentence-transformers' CrossEncoder, and a language model's against transformers."""

import pytest
import torch

from helpers import sentence_models
from helpers.language_models import needs_hf, reranking_tokenizer, tiny_model
from helpers.sentence_models import WORDS
from helpers.serving import served
from radix_ops.engine import Reranker, Template

QUERY = "w1 w2 w3"
DOCUMENTS = [" ".join(WORDS[n : n + 4]) for n in (7, 3, 21, 40, 15)]
TEMPLATE = Template("{instruction} Query: {query}\nDocument: {document}\nRelevant:", " river", 7, "find the river")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    needs_hf()
    return sentence_models.save(tmp_path_factory.mktemp("cross"), head="ForSequenceClassification")


@pytest.fixture(scope="module")
def library(folder):
    return sentence_models.sentence_transformers.CrossEncoder(folder, device="cpu")


@pytest.fixture(scope="module")
def client(folder):
    with served(Reranker(folder, device="cpu", lazy=True), names=("ranker",)) as client:
        yield client


def test_teis_ranks_are_those_of_sentence_transformers(client, library):
    expected = library.rank(QUERY, DOCUMENTS)
    found = client.ask("/rerank", query=QUERY, texts=DOCUMENTS, return_text=True)
    assert [rank["index"] for rank in found] == [entry["corpus_id"] for entry in expected]
    assert [rank["score"] for rank in found] == pytest.approx([float(e["score"]) for e in expected], abs=2e-6)
    assert [rank["text"] for rank in found] == [DOCUMENTS[rank["index"]] for rank in found]
    raw = client.ask("/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=True)
    logits = library.predict([(QUERY, text) for text in DOCUMENTS], activation_fn=torch.nn.Identity())
    assert [rank["score"] for rank in raw] == pytest.approx([logits[rank["index"]] for rank in raw], abs=2e-6)
    assert [set(rank) for rank in raw] == [{"index", "score"}] * len(DOCUMENTS)
    assert client.ask("/", query=QUERY, texts=DOCUMENTS) == client.ask("/rerank", query=QUERY, texts=DOCUMENTS)


@pytest.mark.parametrize("version", ["1", "2"])
def test_coheres_ranks_are_those_of_sentence_transformers(client, library, version):
    expected = library.rank(QUERY, DOCUMENTS)
    documents = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, *DOCUMENTS[2:]]
    found = client.ask(
        f"/v{version}/rerank", query=QUERY, documents=documents, top_n=2, return_documents=True, model="ranker"
    )
    assert [rank["index"] for rank in found["results"]] == [entry["corpus_id"] for entry in expected[:2]]
    scores = [rank["relevance_score"] for rank in found["results"]]
    assert scores == pytest.approx([float(entry["score"]) for entry in expected[:2]], abs=2e-6)
    assert [rank["document"]["text"] for rank in found["results"]] == [DOCUMENTS[e["corpus_id"]] for e in expected[:2]]
    assert found["meta"]["api_version"]["version"] == version
    count = sum(len(library.tokenizer(QUERY, text)["input_ids"]) for text in DOCUMENTS)
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}


def test_vllms_scores_are_those_of_pairs(client, library):
    one = client.ask("/score", text_1=QUERY, text_2=DOCUMENTS)
    expected = library.predict([(QUERY, text) for text in DOCUMENTS])
    assert [entry["score"] for entry in one["data"]] == pytest.approx(expected.tolist(), abs=2e-6)
    pairs = client.ask("/score", queries=DOCUMENTS[:2], documents=DOCUMENTS[2:4])
    expected = library.predict(list(zip(DOCUMENTS[:2], DOCUMENTS[2:4], strict=True)))
    assert [entry["score"] for entry in pairs["data"]] == pytest.approx(expected.tolist(), abs=2e-6)
    refused = client.post("/score", {"text_1": DOCUMENTS[:2], "text_2": DOCUMENTS[:3]})
    assert refused.status_code == 400


def test_a_language_model_answers_in_its_template():
    needs_hf()
    model, tokenizer = tiny_model("Qwen3", max_position_embeddings=256), reranking_tokenizer()
    yes = tokenizer.encode(" river", add_special_tokens=False)

    def expected(instruction):
        found = []
        for document in ("the Seine", "the sea"):
            parts = (f"{instruction} Query: a river\nDocument: {document}", "\nRelevant:")
            ids = [token for text in parts for token in tokenizer.encode(text, add_special_tokens=False)]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double()
            found.append(logits[[*yes, 7]].softmax(0)[0].item())
        return found

    with served(Reranker(model, tokenizer, template=TEMPLATE)) as client:
        for instruction in (None, "find the sea"):
            body = {"query": "a river", "documents": ["the Seine", "the sea"]}
            body |= {"instruction": instruction} if instruction else {}
            found = client.ask("/v2/rerank", **body)
            scores = {rank["index"]: rank["relevance_score"] for rank in found["results"]}
            assert [scores[0], scores[1]] == pytest.approx(expected(instruction or "find the river"), abs=2e-5)


def test_documents_that_do_not_fit_are_refused_or_cut_and_counted(client):
    long = " ".join(WORDS * 3)
    refused = client.post("/v2/rerank", {"query": QUERY, "documents": [DOCUMENTS[0], long]})
    assert refused.status_code == 400
    assert "documents[1]" in refused.json()["message"]
    assert refused.json()["detail"] == refused.json()["message"]
    assert client.post("/rerank", {"query": QUERY, "texts": [long]}).json()["error"].startswith("texts[0] takes")
    cut = client.post("/v2/rerank", {"query": QUERY, "documents": [DOCUMENTS[0], long], "truncate": True})
    assert (cut.status_code, cut.headers["x-truncated"]) == (200, "1")


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"documents": []}, 400, "documents is an empty array"),
        ({"documents": "w1"}, 400, "documents is a string; it must be an array"),
        ({"documents": [{"title": "w1"}]}, 400, "documents[0] must be a string, or an object"),
        ({"documents": [3]}, 400, "documents[0] must be a string"),
        ({"top_n": 0}, 400, "top_n must be a whole number from 1, got 0"),
        ({"max_tokens_per_doc": 9}, 400, "max_tokens_per_doc is 9; documents are read whole"),
        ({"model": "another"}, 404, "the model 'another' is not served here; 'ranker' is"),
        ({"query": 7}, 400, "query is 7; it must be a string"),
        ({"instruction": "w1"}, 400, 'the request has an "instruction", which a cross-encoder does not take'),
        ({"documents": ["w1"] * 1025}, 400, "documents has 1,025 inputs, and the most are 1,024"),
    ],
)
def test_what_cannot_be_ranked_is_refused_in_coheres_shape(client, changes, status, said):
    found = client.post("/v2/rerank", {"query": QUERY, "documents": DOCUMENTS} | changes)
    assert found.status_code == status
    assert found.json()["message"].startswith(said)
