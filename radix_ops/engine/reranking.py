"""Relevance of documents to a query: by a language model that answers yes or no, or by a cross-encoder's one logit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .batches import Compute
from .errors import UserError
from .inputs import Record
from .items import Items, first_equals, shortest_decimals
from .messages import Chat
from .runners import Runner
from .scoring import MAX_LOGIT_BYTES
from .templates import Template
from .tokenizing import cutting_right, in_turn

RESERVED_KEYS = ("scores", "order")
SHAPE = 'one object {"query": ..., "documents": [...]} a line'
_QUERIES_AT_ONCE = 64  # given to the tokenizer


@dataclass(frozen=True)
class Query:
    """A query with its documents; `where` names it in messages, `extra` holds all other keys."""

    where: str
    query: str
    documents: list[str]
    instruction: str | None
    extra: dict


def parse_query(record: Record) -> Query:
    """Return the query of {"query": str, "documents": [str, ...], ...}, perhaps with an "instruction"."""
    query, documents = record.text("query"), record.texts("documents")
    instruction = record.text("instruction") if "instruction" in record.fields else None
    extra = record.others(("query", "documents", "instruction"), RESERVED_KEYS)
    return Query(record.where, query, documents, instruction, extra)


def check_instruction(query: Query, template: Template | None) -> Query:
    """Return the query. UserError where it brings an instruction that nothing takes, or lacks one."""
    takes = template is not None and template.takes_instruction
    if query.instruction is not None and not takes:
        raise UserError(
            f'{query.where} has an "instruction", which {"the template" if template else "a cross-encoder"} '
            f"does not take{'' if template else '; a --template with {instruction} does'}"
        )
    if query.instruction is None and takes and template is not None and template.instruction is None:
        raise UserError(f'{query.where} has no "instruction", and the template no default for it')
    return query


def encode(
    queries: Iterable[Query],
    tokenizer,
    template: Template | None,
    max_length: int | None,
    truncate_right: bool,
    chat: Chat | None = None,
    prompt: str = "",
) -> Items:
    """Return the token ids of each query with each of its documents: in the template, as the messages of a chat, or
    else as the pair that the tokenizer makes of prompt and query, and document.

    A template's text brings all special tokens along; a pair gets those that the tokenizer puts around one. Where that
    is more than `max_length` tokens it is a UserError or, with `truncate_right`, the document loses its end; at least
    one token of it stays, or it is a UserError, too.
    """
    encoded, queries = Items(), iter(queries)
    while part := list(itertools.islice(queries, _QUERIES_AT_ONCE)):
        room = max_length if truncate_right else None
        if template:
            found = _in_template(part, tokenizer, template, room)
        else:
            found = _as_messages(part, chat, room) if chat else _as_pairs(part, tokenizer, prompt, room)
        for query in part:
            sequences = list(itertools.islice(found, len(query.documents)))
            for index, ids in enumerate(sequences):
                _check_length(f"{query.where}: documents[{index}]", len(ids), max_length)
            encoded.append(sequences)
    return encoded


def _check_length(where: str, length: int, max_length: int | None) -> None:
    if not length:
        raise UserError(f"{where} and its query yield no tokens")
    if max_length is not None and length > max_length:
        raise UserError(
            f"{where} takes {length} tokens with its query, and the most are {max_length}; "
            "--truncate-right drops tokens from the document's end"
        )


def _in_template(queries: list[Query], tokenizer, template: Template, room: int | None) -> Iterator[list[int]]:
    def ids_of(texts: list[str]) -> list[list[int]]:
        with in_turn(tokenizer):
            return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    parts = [template.parts(q.query, template.instruction if q.instruction is None else q.instruction) for q in queries]
    tails = ids_of([tail for _, tail in parts]) if any(tail for _, tail in parts) else [[]] * len(parts)
    whole = iter(
        ids_of([head + document for q, (head, _) in zip(queries, parts, strict=True) for document in q.documents])
    )
    heads = ids_of([head for head, _ in parts])
    for query, head, tail in zip(queries, heads, tails, strict=True):
        for index in range(len(query.documents)):
            ids = next(whole)
            if room is not None and len(ids) + len(tail) > room:
                if len(head) + 1 + len(tail) > room:
                    raise UserError(
                        f"{query.where}: documents[{index}] has no room: template and query take "
                        f"{len(head) + len(tail)} tokens, and the most are {room}"
                    )
                ids = ids[: room - len(tail)]
            yield ids + tail


def _as_messages(queries: list[Query], chat: Chat, room: int | None) -> Iterator[list[int]]:
    for query in queries:
        turns = [[("query", query.query), ("document", document)] for document in query.documents]
        for index, (turn, ids) in enumerate(zip(turns, chat.ids(turns), strict=True)):
            fits = room is None or len(ids) <= room
            yield ids if fits or room is None else chat.cut(ids, turn, room, f"{query.where}: documents[{index}]")


def _as_pairs(queries: list[Query], tokenizer, prompt: str, room: int | None) -> Iterator[list[int]]:
    first, second = zip(*((prompt + q.query, document) for q in queries for document in q.documents), strict=True)
    options = {"add_special_tokens": True, "verbose": False}
    with in_turn(tokenizer):
        batch = tokenizer(list(first), list(second), **options)
    if any(map(any, batch.get("token_type_ids", []))):
        raise UserError("the model's tokenizer marks which text a token is of, which radix-ops rerank can't pass on")
    if room is None:
        yield from batch["input_ids"]
        return
    wheres = (f"{q.where}: documents[{index}]" for q in queries for index in range(len(q.documents)))
    for where, query, document, ids in zip(wheres, first, second, batch["input_ids"], strict=True):
        if len(ids) > room:
            with in_turn(tokenizer):
                size = len(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
            if len(ids) - room >= size:
                raise UserError(
                    f"{where} has no room: its query takes {len(ids) - size} tokens, and the most are {room}"
                )
            with cutting_right(tokenizer):
                ids = tokenizer(query, document, truncation="only_second", max_length=room, **options)["input_ids"]
        yield ids


def scorer(runner: Runner, answers: tuple[int, int | None] | None, activation: str = "sigmoid") -> Compute:
    """Return a function of (indices, inputs) that computes their scores, float32 [len(inputs)]: the sigmoid of a logit,
    or the logit where the activation is "identity".

    The logit is a cross-encoder's or, with the ids of two answers, the one's as the next token less the other's, whose
    sigmoid is P(one) against the other; with one answer it is its own.
    """

    def by_logit(sequences: list[np.ndarray]) -> torch.Tensor:
        classifier: Any = runner
        return classifier.logits(sequences)

    def by_answer(sequences: list[np.ndarray]) -> torch.Tensor:
        last = runner.states(sequences).last()  # [B, D]
        chunk = max(1, MAX_LOGIT_BYTES // (4 * runner.head.weight.shape[0]))
        given = torch.tensor([token for token in answers or () if token is not None], device=last.device)
        logits = torch.cat([runner.head(part)[:, given] for part in last.split(chunk)]).float()
        return logits[:, 0] - logits[:, 1] if len(given) == 2 else logits[:, 0]

    logit_of = by_logit if answers is None else by_answer

    def compute(indices: np.ndarray, inputs: list[np.ndarray]) -> tuple[np.ndarray]:
        logits = logit_of(inputs)
        return ((logits.sigmoid() if activation == "sigmoid" else logits).cpu().numpy(),)

    return compute


def order_of(scores: np.ndarray) -> list[int]:
    """Return the documents by score, the best first; equal ones in their order."""
    return np.argsort(-scores, kind="stable").tolist()


def result(query: Query, scores: np.ndarray) -> dict:
    """Return the output object of one query. UserError for a score that isn't finite.

    Equal documents get what the first of them did, which rounding may set apart where they ran in different batches.
    """
    scores = scores[first_equals(query.documents)]
    for index, score in enumerate(scores.tolist()):
        if not math.isfinite(score):
            raise UserError(f"{query.where}: documents[{index}] got the score {score}; try --dtype float32")
    return {
        **query.extra,
        "scores": shortest_decimals(scores),
        "order": order_of(scores),
    }
