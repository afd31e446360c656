"""The routes of a Scorer against transformers' logits, one sequence at a time in float64."""

import pytest
import torch

from helpers.language_models import TEXT, checked_scores, needs_hf, tiny_model, tiny_tokenizer
from helpers.serving import served
from radix_ops.engine import Scorer

QUESTIONS = [
    {"context": TEXT[1] + " Answer:", "choices": [" the Seine", " the river", " the"], "id": 3},
    {"context": TEXT[1] + " Not:", "choices": [" the Seine", " no"]},
    {"context": TEXT[2], "choices": [" yes", " no", " maybe"]},
]


@pytest.fixture(scope="module")
def model():
    needs_hf()
    return tiny_model(max_position_embeddings=256)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(True)


@pytest.fixture(scope="module")
def client(model, tokenizer):
    with served(Scorer(model, tokenizer), names=("tiny",)) as client:
        yield client


def logprobs_of(model, ids):
    """Return the log-probabilities of all tokens behind each of the ids, float64 [L, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_choices_are_those_of_the_score_command(client, model, tokenizer):
    found = client.ask("/choices", items=QUESTIONS)["results"]
    for result, extra in checked_scores(found, QUESTIONS, model, tokenizer):
        assert extra.items() <= result.items()
    one = client.ask("/choices", items=QUESTIONS[0])["results"]
    assert one[0]["logprobs"] == pytest.approx(found[0]["logprobs"], abs=1e-4)
    assert client.ask("/", items=QUESTIONS[0])["results"][0]["id"] == 3


def test_texts_are_scored_whole(client, model, tokenizer):
    found = client.ask("/choices", items=[{"text": text} for text in [*TEXT, ""]])["results"]
    for text, result in zip(TEXT, found, strict=False):
        ids = tokenizer(text)["input_ids"]
        every = logprobs_of(model, ids)
        expected = every[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item()
        assert (result["logprob"], result["tokens"]) == (pytest.approx(expected, abs=1e-3), len(ids) - 1)
    assert (found[-1]["logprob"], found[-1]["perplexity"]) == (0.0, None)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_echoed_prompts_bring_the_log_probabilities_of_transformers(client, model, tokenizer, count):
    ids = [tokenizer(text)["input_ids"] for text in TEXT]
    found = client.ask(
        "/v1/completions", prompt=[TEXT[0], *ids[1:]], model="tiny", echo=True, logprobs=count, max_tokens=1,
        temperature=0, return_tokens_as_token_ids=True, seed=1234,
    )  # fmt: skip
    assert found["usage"] == {"prompt_tokens": sum(map(len, ids)), "completion_tokens": 3} | {
        "total_tokens": sum(map(len, ids)) + 3
    }
    for prompt, choice in zip(ids, found["choices"], strict=True):
        every, read = logprobs_of(model, prompt), choice["logprobs"]
        likeliest = int(every[-1].argmax())
        shown = [*prompt, likeliest]
        assert read["tokens"] == [f"token_id:{token}" for token in shown]
        expected = every[torch.arange(len(prompt)), torch.tensor(shown[1:])].tolist()
        assert read["token_logprobs"][0] is None
        assert read["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        assert read["top_logprobs"][0] is None
        for place, top in enumerate(read["top_logprobs"][1:]):
            best = every[place].topk(count)
            wanted = {
                f"token_id:{token}": x for token, x in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            }
            assert top == pytest.approx({f"token_id:{shown[place + 1]}": expected[place]} | wanted, abs=1e-4)
        assert choice["finish_reason"] == "length"
    assert found["choices"][0]["text"] == TEXT[0] + tokenizer.decode([int(logprobs_of(model, ids[0])[-1].argmax())])


def test_text_offsets_are_those_of_the_tokens_texts(client):
    read = client.ask("/v1/completions", prompt=TEXT[0], echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    text = "".join(read["tokens"])
    for token, start in zip(read["tokens"], read["text_offset"], strict=True):
        assert text[start : start + len(token)] == token
    assert len(read["tokens"]) == len(read["token_logprobs"]) == len(read["top_logprobs"])


def test_without_echo_the_next_token_stands_alone(client, model, tokenizer):
    ids = tokenizer(TEXT[1])["input_ids"]
    (choice,) = client.ask("/v1/completions", prompt=ids, logprobs=2, max_tokens=1)["choices"]
    expected = logprobs_of(model, ids)[-1]
    assert choice["text"] == tokenizer.decode([int(expected.argmax())])
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([expected.max().item()], abs=1e-4)
    (bare,) = client.ask("/v1/completions", prompt=ids, max_tokens=1)["choices"]
    assert bare["logprobs"] is None


@pytest.mark.parametrize("apply_softmax", [False, True])
@pytest.mark.parametrize("item_first", [False, True])
def test_label_tokens_have_the_probabilities_of_the_next_token(client, model, tokenizer, apply_softmax, item_first):
    items, labels = [" yes", " no, the Rhine", ""], [7, 250, 9]
    found = client.ask(
        "/v1/score", query=TEXT[2], items=items, label_token_ids=labels, apply_softmax=apply_softmax,
        item_first=item_first,
    )  # fmt: skip
    for item, scores in zip(items, found["scores"], strict=True):
        ids = tokenizer(item + TEXT[2] if item_first else TEXT[2] + item)["input_ids"]
        logprobs = logprobs_of(model, ids)[-1][labels]
        expected = logprobs.softmax(0) if apply_softmax else logprobs.exp()
        assert scores == pytest.approx(expected.tolist(), rel=1e-3)
    ids = client.ask("/v1/score", query=[5, 6], items=[[7], [8, 9]], label_token_ids=labels)
    expected = logprobs_of(model, [5, 6, 8, 9])[-1][labels].exp()
    assert ids["scores"][1] == pytest.approx(expected.tolist(), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"max_tokens": 2}, "max_tokens", "max_tokens is 2"),
        ({"max_tokens": None}, "max_tokens", "max_tokens is 16"),
        ({"max_tokens": 0, "echo": False}, "echo", "max_tokens is 0 and echo is not true"),
        ({"n": 2}, "n", "n is 2"),
        ({"stream": True}, "stream", "stream is True"),
        ({"temperature": 0.7}, "temperature", "temperature is 0.7"),
        ({"best_of": 3}, "best_of", "best_of is 3"),
        ({"suffix": "x"}, "suffix", "suffix is 'x'"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21; input should be less than or equal to 20"),
        ({"prompt": []}, "prompt", "prompt is an empty array"),
        ({"prompt": [[1, 340]]}, "prompt[0]", "prompt[0] holds 340; the model's token ids are from 0 to 339"),
        ({"prompt": [[1, True]]}, "prompt", "prompt[0] is an array of something else"),
        ({"prompt": [5] * 300}, "prompt", "prompt has 300 tokens and the model reads at most 256"),
    ],
)
def test_what_would_generate_or_cannot_be_read_is_refused_in_openais_shape(client, changes, param, said):
    body = {"prompt": TEXT[0], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    found = client.post("/v1/completions", body | changes)
    error = found.json()["error"]
    assert (found.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"].startswith(said)


def test_the_model_is_named_and_no_other_is_served(client):
    found = client.get("/v1/models").json()
    assert [model["id"] for model in found["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["max_model_len"] == 256
    for refused in (client.get("/v1/models/x"), client.post("/v1/completions", {"prompt": "a", "model": "x"})):
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
