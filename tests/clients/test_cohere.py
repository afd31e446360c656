"""Cohere's own client, of both versions of its API."""

import cohere
import pytest


@pytest.mark.parametrize("kind", [cohere.Client, cohere.ClientV2])
def test_ranks(ranker, expected, kind):
    client = kind(api_key="none", base_url=ranker.url)
    found = client.rerank(model="tiny-rerank", query=expected["texts"][0], documents=expected["texts"][1:], top_n=4)
    best = sorted(range(9), key=lambda index: -expected["rank_scores"][index])[:4]
    assert [result.index for result in found.results] == best
    scores = [result.relevance_score for result in found.results]
    assert scores == pytest.approx([expected["rank_scores"][index] for index in best], abs=2e-6)
    assert found.meta.api_version.version == ("1" if kind is cohere.Client else "2")


def test_documents_come_back_on_request(ranker, expected):
    client = cohere.Client(api_key="none", base_url=ranker.url)
    documents = [{"text": text} for text in expected["texts"][1:]]
    found = client.rerank(query=expected["texts"][0], documents=documents, return_documents=True)
    assert [result.document.text for result in found.results] == [
        expected["texts"][1 + result.index] for result in found.results
    ]


def test_errors_are_the_clients_own(ranker, embedder):
    client = cohere.ClientV2(api_key="none", base_url=ranker.url)
    with pytest.raises(cohere.BadRequestError) as caught:
        client.rerank(model="tiny-rerank", query="w1", documents=[])
    assert "documents is an empty array" in caught.value.body["message"]
    with pytest.raises(cohere.NotFoundError):
        client.rerank(model="another", query="w1", documents=["w2"])
    with pytest.raises(cohere.NotFoundError):
        cohere.ClientV2(api_key="none", base_url=embedder.url).rerank(model="m", query="w1", documents=["w2"])
