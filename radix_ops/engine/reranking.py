"""Relevance of documents to a query: by a language model that answers yes or no, or by a cross-encoder's one logit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import torch

from .batches import Compute
from .errors import TooLong, UserError
from .inputs import Record, check_text, kind_of
from .items import Items, first_equals, shortest_decimals
from .messages import Chat
from .runners import Runner, last_tokens
from .scoring import MAX_LOGIT_BYTES
from .templates import Template
from .tokenizing import cutting_right, in_turn

RESERVED_KEYS = ("scores", "order")
Identifier: TypeAlias = str | int
SHAPE = 'one object {"query": ..., "documents": [...]} a line'
MOST_RELEVANT = 1_000_000  # trec_eval's memory holds a number for each degree of relevance
_QUERIES_AT_ONCE = 64  # given to the tokenizer


@dataclass(frozen=True)
class Query:
    """A query with its documents; `where` names it in messages, `extra` holds all other keys."""

    where: str
    query: str
    documents: list[str]
    instruction: str | None
    extra: dict
    ids: list[Identifier] | None = None  # of the documents


def parse_query(record: Record, reserved: tuple[str, ...] = ()) -> Query:
    """Return the query of {"query": str, "documents": [...], ...}, perhaps with an "instruction".

    A document is a string, or an object {"text": str} perhaps with "title" and "id", whose other keys aren't read: all
    documents have an id or none has. "query_id" and "relevance", a whole number for each document, are checked and stay
    in `extra`, which may hold none of the `reserved` keys.
    """
    query, (documents, ids) = record.text("query"), _documents(record)
    instruction = record.text("instruction") if "instruction" in record.fields else None
    reserved = (*RESERVED_KEYS, *(["ids"] if ids else []), *reserved)
    extra = record.others(("query", "documents", "instruction"), reserved)
    check_judgement(record.where, extra, len(documents))
    return Query(record.where, query, documents, instruction, extra, ids)


def _documents(record: Record) -> tuple[list[str], list[Identifier] | None]:
    """Return the documents' texts, and their ids where they have some."""
    given = record.field("documents", "an array of strings")
    if not isinstance(given, list):
        raise UserError(f'{record.where}: "documents" is {kind_of(given)}; it must be an array of strings')
    texts: list[str] = []
    ids: list[Any] = []
    for index, document in enumerate(given):
        where = f"{record.where}: documents[{index}]"
        if not isinstance(document, (str, Mapping)):
            raise UserError(f'{where} is {kind_of(document)}; it must be a string or an object with a "text"')
        texts.append(
            check_text(document, where) if isinstance(document, str) else _joined(Record(where, dict(document)))
        )
        found = None if isinstance(document, str) else document.get("id")
        ids.append(None if found is None else _check_id(found, f'{where}: "id"'))
    named = sum(one is not None for one in ids)
    if not named:
        return texts, None
    if named < len(ids):
        raise UserError(f"{record.where}: documents[{ids.index(None)}] has no id, and others have one")
    first: dict[str, int] = {}
    for index, one in enumerate(ids):
        if first.setdefault(str(one), index) != index:
            raise UserError(f"{record.where}: documents[{index}] has the id {one!r} of documents[{first[str(one)]}]")
    return texts, ids


def _joined(document: Record) -> str:
    """Return title and text as BEIR joins them, or the text as it is where there is no title."""
    text = document.text("text")
    return text if document.fields.get("title") is None else f"{document.text('title')} {text}".strip()


def _check_id(value: Any, where: str) -> Identifier:
    if isinstance(value, bool) or not isinstance(value, (str, Integral)):
        raise UserError(f"{where} is {kind_of(value)}; it must be a string or a whole number")
    return check_text(value, where) if isinstance(value, str) else int(value)


def check_judgement(where: str, extra: dict, count: int) -> None:
    """UserError for a "query_id" that is none, and for a "relevance" other than a whole number for each document."""
    if extra.get("query_id") is not None:
        _check_id(extra["query_id"], f'{where}: "query_id"')
    if extra.get("relevance") is not None:
        _check_relevance(extra["relevance"], count, f'{where}: "relevance"')


def _check_relevance(value, count: int, where: str) -> None:
    if not isinstance(value, list):
        raise UserError(f"{where} is {kind_of(value)}; it must be an array of whole numbers, one for each document")
    if len(value) != count:
        raise UserError(f"{where} has {len(value)} numbers, and there are {count} documents")
    for index, number in enumerate(value):
        is_number = isinstance(number, Real) and not isinstance(number, bool)
        if not is_number or number % 1 or abs(number) > MOST_RELEVANT:
            found = number if is_number else kind_of(number)
            raise UserError(f"{where}[{index}] is {found}; it must be a whole number, {MOST_RELEVANT:,} at most")


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
        raise TooLong(
            f"{where} takes {length} tokens with its query, and the most are {max_length}; "
            "--truncate-right drops tokens from the document's end"
        )


def _in_template(queries: list[Query], tokenizer, template: Template, room: int | None) -> Iterator[list[int]]:
    def ids_of(texts: list[str]) -> list[list[int]]:
        with in_turn(tokenizer):
            return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

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
        if not query.documents:
            continue
        turns = [[("query", query.query), ("document", document)] for document in query.documents]
        for index, (turn, ids) in enumerate(zip(turns, chat.ids(turns), strict=True)):
            fits = room is None or len(ids) <= room
            yield ids if fits or room is None else chat.cut(ids, turn, room, f"{query.where}: documents[{index}]")


def _as_pairs(queries: list[Query], tokenizer, prompt: str, room: int | None) -> Iterator[list[int]]:
    pairs = [(prompt + q.query, document) for q in queries for document in q.documents]
    if not pairs:
        return
    first, second = map(list, zip(*pairs, strict=True))
    options = {"add_special_tokens": True, "verbose": False}
    with in_turn(tokenizer):
        batch = tokenizer(first, second, **options)
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
        return classifier.logits(sequences)[:, 0]

    def by_answer(sequences: list[np.ndarray]) -> torch.Tensor:
        last = runner.states(sequences, last_tokens(sequences)).last()  # [B, D]
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


def result(query: Query, scores: np.ndarray, top_k: int | None = None, return_documents: bool = False) -> dict:
    """Return the output object of one query, whose order, ids and texts are of the `top_k` best documents. UserError
    for a score that isn't finite.

    Equal documents get what the first of them did, which rounding may set apart where they ran in different batches.
    """
    scores = scores[first_equals(query.documents)]
    for index, score in enumerate(scores.tolist()):
        if not math.isfinite(score):
            raise UserError(f"{query.where}: documents[{index}] got the score {score}; try --dtype float32")
    order = order_of(scores)[:top_k]
    found = {**query.extra, "scores": shortest_decimals(scores), "order": order}
    if query.ids:
        found["ids"] = [query.ids[index] for index in order]
    if return_documents:
        found["texts"] = [query.documents[index] for index in order]
    return found
