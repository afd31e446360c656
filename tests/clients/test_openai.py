"""OpenAI's own client, and LangChain's on it."""

import asyncio

import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from conftest import KEY


def client_of(server, key="none", **options):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, **options)


def close(found, expected):
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=2e-6)


def test_embeddings(embedder, expected):
    client = client_of(embedder)
    for given in (expected["texts"], expected["ids"]):
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            found = client.embeddings.create(model="tiny-embed", input=given, **options)
            rows = [entry.embedding for entry in found.data]
            if options.get("encoding_format") == "base64":  # which the client leaves to whoever asks for it
                import base64

                rows = [
                    np.frombuffer(base64.b64decode(row), np.float32) if isinstance(row, str) else row for row in rows
                ]
            close(rows, expected["embeddings"])
            assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, expected["ids"]))
            assert found.model == "tiny-embed"
    (one,) = client.embeddings.create(model="tiny-embed", input=expected["texts"][0], dimensions=5).data
    whole = np.array(expected["embeddings"][0][:5])
    close(one.embedding, whole / np.linalg.norm(whole))


def test_many_at_once(embedder, expected):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{embedder.url}/v1", api_key="none") as client:
            calls = [client.embeddings.create(model="tiny-embed", input=text) for text in expected["texts"] * 10]
            return [found.data[0].embedding for found in await asyncio.gather(*calls)]

    close(asyncio.run(run()), expected["embeddings"] * 10)


def test_completions(scorer, expected):
    found = client_of(scorer).completions.create(
        model="tiny-score", prompt=expected["scored"], echo=True, logprobs=2, max_tokens=1, temperature=0
    )
    for choice, logprobs in zip(found.choices, expected["logprobs"], strict=True):
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(logprobs, abs=1e-4)
        assert all(1 <= len(top) <= 3 for top in choice.logprobs.top_logprobs[1:])
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(logprobs) + 1
        assert choice.finish_reason == "length"
    assert [choice.text.startswith(text) for choice, text in zip(found.choices, expected["scored"], strict=True)]
    assert found.usage.completion_tokens == 2


def test_models(embedder):
    client = client_of(embedder)
    assert [model.id for model in client.models.list()] == ["tiny-embed"]
    assert client.models.retrieve("tiny-embed").owned_by == "radix_ops"


def test_errors_are_the_clients_own(embedder, scorer, guarded, expected):
    client = client_of(embedder)
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="another", input="w1")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="tiny-embed", input=" ".join(expected["texts"] * 4))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_tokens is 5"):
        client_of(scorer).completions.create(model="tiny-score", prompt="a", max_tokens=5)
    with pytest.raises(openai.AuthenticationError):
        client_of(guarded, "wrong").embeddings.create(model="tiny-embed", input="w1")
    assert client_of(guarded, KEY).embeddings.create(model="tiny-embed", input="w1").data


def test_langchain(embedder, expected):
    # Without check_embedding_ctx_length=False it sends the token ids of OpenAI's models.
    model = OpenAIEmbeddings(
        model="tiny-embed", base_url=f"{embedder.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    close(model.embed_documents(expected["texts"]), expected["embeddings"])
    close(model.embed_query(expected["texts"][0]), expected["embeddings"][0])
