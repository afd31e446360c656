"""Clients of text-embeddings-inference: Hugging Face's, tei-client, LlamaIndex's, Baseten's."""

import numpy as np
import pytest
from baseten_performance_client import PerformanceClient, RequestProcessingPreference
from huggingface_hub import InferenceClient
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from tei_client import HttpClient

from conftest import KEY


def close(found, expected):
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=2e-6)


def ranks_of(expected):
    return np.argsort([-score for score in expected["rank_scores"]]).tolist()


def test_hugging_face_inference(embedder, classifier, guarded, expected):
    client = InferenceClient(model=embedder.url)
    close(client.feature_extraction(expected["texts"]), expected["embeddings"])
    one = client.feature_extraction(expected["texts"][0], normalize=True, prompt_name="query", truncate=True)
    close(one, expected["query_embeddings"][:1])
    rows = np.array(expected["embeddings"])
    close(client.sentence_similarity(expected["texts"][0], expected["texts"][1:]), rows[1:] @ rows[0])
    found = InferenceClient(model=classifier.url).text_classification(expected["scored"][0])
    assert {entry.label: entry.score for entry in found} == pytest.approx(expected["labels"][0], abs=2e-6)
    close(InferenceClient(model=guarded.url, token=KEY).feature_extraction(expected["texts"]), expected["embeddings"])


def test_tei_client_embeds(embedder, expected):
    client = HttpClient(embedder.url)
    assert client.health()
    assert client.info().server_model_id == "tiny-embed"
    close(client.embed(expected["texts"]), expected["embeddings"])
    close(client.embed(expected["texts"], prompt_name="query"), expected["query_embeddings"])
    states = client.embed_all(expected["texts"])
    last = np.array([rows[-1] for rows in states])
    close(last / np.linalg.norm(last, axis=1, keepdims=True), expected["embeddings"])
    assert [result.get_ids() for result in client.tokenize(expected["texts"])] == expected["ids"]
    assert client.decode(expected["ids"][0])
    assert sorted(client.prompt_names()) == sorted(expected["prompts"])


def test_tei_client_classifies_and_ranks(classifier, ranker, expected):
    found = HttpClient(classifier.url).classify(expected["scored"])
    for result, labels in zip(found, expected["labels"], strict=True):
        assert {entry.label: entry.score for entry in result.scores} == pytest.approx(labels, abs=2e-6)
    ranks = HttpClient(ranker.url).rerank(expected["texts"][0], expected["texts"][1:], return_text=True).ranks
    assert [rank.index for rank in ranks] == ranks_of(expected)
    assert [rank.text for rank in ranks] == [expected["texts"][1 + rank.index] for rank in ranks]


def test_llama_index(embedder, ranker, guarded, expected):
    for server, token in ((embedder, None), (guarded, KEY)):
        model = TextEmbeddingsInference(
            model_name="none", base_url=server.url, query_instruction="", text_instruction="", auth_token=token
        )
        close(model.get_text_embedding_batch(expected["texts"]), expected["embeddings"])
        close(model.get_query_embedding(expected["texts"][0]), expected["embeddings"][0])
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in expected["texts"][1:]]
    found = TextEmbeddingInference(base_url=ranker.url, top_n=3).postprocess_nodes(
        nodes, query_str=expected["texts"][0]
    )
    assert [node.text for node in found] == [expected["texts"][1 + index] for index in ranks_of(expected)[:3]]


def test_baseten_performance_client(embedder, ranker, classifier, expected):
    client = PerformanceClient(base_url=embedder.url, api_key="none")
    few = RequestProcessingPreference(batch_size=3, max_concurrent_requests=8)
    found = client.embed(expected["texts"] * 20, model="tiny-embed", preference=few)
    close(found.numpy(), expected["embeddings"] * 20)
    assert found.usage.total_tokens == 20 * sum(map(len, expected["ids"]))
    client = PerformanceClient(base_url=ranker.url, api_key="none")
    ranked = client.rerank(expected["texts"][0], expected["texts"][1:])
    scores = {result.index: result.score for result in ranked.data}
    assert [scores[index] for index in range(len(scores))] == pytest.approx(expected["rank_scores"], abs=2e-6)
    client = PerformanceClient(base_url=classifier.url, api_key="none")
    for group, labels in zip(client.classify(expected["scored"]).data, expected["labels"], strict=True):
        assert {result.label: result.score for result in group} == pytest.approx(labels, abs=2e-6)
