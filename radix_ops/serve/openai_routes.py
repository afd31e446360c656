"""OpenAI's routes: embeddings, completions for the log-probabilities of prompts, and the model."""

from __future__ import annotations

import asyncio
import functools
import itertools
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from ..engine.computing import Read
from . import inputs, replies, tokens
from .inputs import Fields, Salt, Texts
from .routing import OpenAIRoute, router
from .server import Server, server_of
from .shapes import Unusable
from .tasks import Text, size_of

routes = router(OpenAIRoute, "OpenAI")
MOST_LOGPROBS = 20
# What a completion may say only as if it had not been said: (field, values that change nothing).
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, None), "best_of": (1, None), "stream": (False, None), "suffix": ("", None), "stop": ([], "", None),
    "truncate_prompt_tokens": (None,), "prompt_logprobs": (None,),
    "presence_penalty": (0, None), "frequency_penalty": (0, None), "logit_bias": ({}, None), "top_p": (1, None),
}  # fmt: skip


class Truncating(Fields):
    model: str | None = None
    truncate: bool | None = None
    truncate_prompt_tokens: Literal[-1] | None = None  # vLLM's: to as many as the model reads
    cache_salt: Salt = None

    @property
    def cuts(self) -> bool:
        return bool(self.truncate) or self.truncate_prompt_tokens == -1


class EmbeddingsRequest(Truncating):
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    prompt_name: str | None = None
    user: str | None = None


class CompletionsRequest(Fields):
    model_config = ConfigDict(extra="allow", strict=True)

    prompt: Texts
    model: str | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    add_special_tokens: bool = True
    return_tokens_as_token_ids: bool = False
    cache_salt: Salt = None


@routes.post("/v1/embeddings")
async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
    """Return an embedding for each input."""
    server = server_of(request)
    server.check_task(request, "embed")
    server.check_model(body.model)
    server.tasks.check_dim(body.dimensions)
    found = inputs.texts(body.input, "input", server.settings.max_inputs)
    call = server.call(request, body.cuts, body.cache_salt)
    pooled, counts = await server.tasks.embed(call, found.values, found.names, body.prompt_name)
    rows = server.tasks.embeddings(pooled, dim=body.dimensions)
    data = [
        {"object": "embedding", "index": index, "embedding": replies.vector(row, body.encoding_format)}
        for index, row in enumerate(rows)
    ]
    content = {"object": "list", "data": data, "model": server.name, "usage": replies.usage(sum(counts))}
    return replies.answer(request, call, content)


@routes.post("/v1/completions")
async def completions(body: CompletionsRequest, request: Request) -> Response:
    """Return the log-probabilities of prompts, and with max_tokens 1 the likeliest next token. Nothing else is
    generated: n is 1, max_tokens 0 or 1, temperature 0."""
    server = server_of(request)
    server.check_task(request, "score")
    server.check_model(body.model)
    count = _check_scoring(body)
    found = inputs.texts(body.prompt, "prompt", server.settings.max_inputs)
    call = server.call(request, salt=body.cache_salt)
    make = functools.partial(_prompts, server, found, body.add_special_tokens)
    prompts, reads = await server.tasks.read(call, make, size_of(call, found.values), max(1, body.logprobs or 0))
    choices = await asyncio.to_thread(_choices, server, body, found, prompts, reads, count)
    head = replies.head("text_completion", "cmpl", server.name)
    usage = replies.usage(sum(map(len, prompts)), count * len(prompts))
    return replies.answer(request, call, {**head, "choices": choices, "usage": usage})


def _check_scoring(body: CompletionsRequest) -> int:
    """Return how many tokens are asked for. Unusable for a request that would generate."""
    count = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
    only = "this server scores prompts: echo, logprobs and max_tokens 0, or 1 for the likeliest next token"
    if count not in (0, 1):
        raise Unusable("invalid", f"max_tokens is {count}; {only}", "max_tokens")
    if count == 0 and not body.echo:
        raise Unusable("invalid", f"max_tokens is 0 and echo is not true, which asks for nothing; {only}", "echo")
    if count and body.temperature not in (None, 0):
        raise Unusable("invalid", f"temperature is {body.temperature}, and nothing is drawn; {only}", "temperature")
    for name, values in _NEUTRAL.items():
        value = (body.model_extra or {}).get(name)
        if value not in values:
            raise Unusable("invalid", f"{name} is {value!r:.40}; {only}", name)
    return count


def _prompts(server: Server, found: inputs.Inputs, special: bool) -> list[list[int]]:
    texts = [text for text in found.values if isinstance(text, str)]
    encoded = iter(tokens.encoded(server.engine.tokenizer, texts, special) if texts else ())
    size, most = server.vocab_size, server.max_length()
    prompts = []
    for value, name in zip(found.values, found.names, strict=True):
        ids = next(encoded) if isinstance(value, str) else inputs.ids(value, name, size)
        if not ids:
            raise Unusable("empty", f"{name} holds no tokens", "prompt")
        if most is not None and len(ids) > most:
            raise Unusable("too_long", f"{name} has {len(ids)} tokens and the model reads at most {most}", "prompt")
        prompts.append(ids)
    return prompts


class _Spelling:
    """The texts of single tokens, as answers have them."""

    def __init__(self, tokenizer: Any, by_id: bool):
        self._tokenizer, self._by_id, self._texts = tokenizer, by_id, dict[int, str]()

    def text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def __call__(self, token: int) -> str:
        if self._by_id:
            return f"token_id:{token}"
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


def _choices(
    server: Server, body: CompletionsRequest, found: inputs.Inputs, prompts: list, reads: list[Read], count: int
) -> list[dict[str, Any]]:
    spelling = _Spelling(server.engine.tokenizer, body.return_tokens_as_token_ids)
    return [
        _choice(body, index, *each, count, spelling)
        for index, each in enumerate(zip(found.values, prompts, reads, strict=True))
    ]


def _choice(
    body: CompletionsRequest, index: int, prompt: Text, ids: list[int], read: Read, count: int, spelling: _Spelling
) -> dict[str, Any]:
    """Return a choice: the prompt's tokens where they are echoed, then the likeliest next one where it is asked for."""
    new = [int(read.likeliest[-1, 0])] * count
    shown = [*(ids if body.echo else ()), *new]
    text = (prompt if isinstance(prompt, str) else spelling.text(ids)) if body.echo else ""
    text += spelling.text(new) if new else ""
    choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": "length"}
    if body.logprobs is None:
        return choice
    first = 0 if body.echo else len(ids)
    logprobs: list[float | None] = [None, *read.logprobs.tolist(), *[float(read.their_logprobs[-1, 0])] * count]
    names = [spelling(token) for token in shown]
    tops: list[dict[str, float] | None] = []
    for place, logprob, name in zip(itertools.count(first), logprobs[first:], names, strict=False):
        if place == 0:
            tops.append(None)
            continue
        likeliest = zip(read.likeliest[place - 1].tolist(), read.their_logprobs[place - 1].tolist(), strict=True)
        top: dict[str, float] = {}
        for other, its in itertools.islice(likeliest, body.logprobs):
            top.setdefault(spelling(other), its)  # tokens of one text: the likelier counts
        assert logprob is not None
        top.setdefault(name, logprob)
        tops.append(top)
    choice["logprobs"] = {
        "tokens": names, "token_logprobs": logprobs[first:], "top_logprobs": tops,
        "text_offset": list(itertools.accumulate((len(name) for name in names[:-1]), initial=0)),
    }  # fmt: skip
    return choice


@routes.get("/v1/models")
async def models(request: Request) -> Response:
    """Return the model, under each of its names."""
    server = server_of(request)
    return replies.json({"object": "list", "data": [_model(server, name) for name in server.names]})


@routes.get("/v1/models/{model:path}")
async def model(model: str, request: Request) -> Response:
    """Return the model of this name."""
    server = server_of(request)
    server.check_model(model)
    return replies.json(_model(server, model))


def _model(server: Server, name: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": int(server.started), "owned_by": "radix_ops", "root": server.name,
        "parent": None, "max_model_len": server.max_length(),
    }  # fmt: skip
