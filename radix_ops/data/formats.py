"""The formats of a data file's lines, and the token sequences that are made of them.

parser = FormatParser(formats())
records = Records("data.jsonl", parser)  # the first line tells the format, all lines are checked
items = parser.format.encode(records, tokenizer)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine import reranking, scoring
from ..engine.errors import UserError
from ..engine.inputs import Record, check_text, kind_of
from ..engine.items import Items
from ..engine.templates import TEMPLATES, find_template
from ..engine.tokenizing import in_turn
from .ids import packed_ids

_LINES_AT_ONCE = 128  # given to the tokenizer
_MAX_ID = 2**31 - 1
PAIRS = "pairs"


@dataclass(frozen=True)
class Format:
    """Lines with these keys. `parse` checks one, `encode` makes an item of each of those that it returned."""

    keys: tuple[str, ...]
    meaning: str  # what a line holds, and which sequences are made of it
    parse: Callable[[Record], object]
    encode: Callable[[Iterable, object], Items]
    needs_tokenizer: bool = True

    @property
    def shape(self) -> str:
        return "{" + ", ".join(f'"{key}"' for key in self.keys) + "}"


class FormatParser:
    """A parser for `Records` that takes the format from the first line; all others must have it."""

    def __init__(self, formats: list[Format]):
        self.formats = formats
        self.format: Format | None = None

    def __call__(self, record: Record):
        if self.format is None:
            self.format = self._find(record)
        return self.format.parse(record)

    def _find(self, record: Record) -> Format:
        found = next((f for f in self.formats if all(key in record.fields for key in f.keys)), None)
        if found is None:
            has = ", ".join(f'"{key}"' for key in list(record.fields)[:8]) or "no keys"
            known = ", ".join(f.shape for f in self.formats)
            raise UserError(f"{record.where} has {has}; a line may have {known}")
        return found


def formats(
    text_key: str = "text", prompt: str = "", template: str | None = None, pair_prompt: str = ""
) -> list[Format]:
    """Return all formats, the most telling keys first.

    `prompt` stands before each text under `text_key`; `template` is a name or file of `find_template`, or PAIRS, where
    `pair_prompt` stands before each query.
    """
    pairs = template == PAIRS
    found = None if template is None or pairs else find_template(template)

    def parse_query(record: Record) -> reranking.Query:
        query = reranking.parse_query(record)
        if not pairs and found is None:
            known = ", ".join(TEMPLATES)
            raise UserError(
                f"{record.where} holds a query and documents: --template must say how a model reads them, {known} or a "
                f"JSON file, or {PAIRS} for the pairs of a cross-encoder"
            )
        return reranking.check_instruction(query, found)

    def encode_queries(queries: Iterable[reranking.Query], tokenizer) -> Items:
        return reranking.encode(queries, tokenizer, found, max_length=None, truncate_right=False, prompt=pair_prompt)

    return [
        Format(("input_ids",), "token ids", _parse_ids, _encode_ids, needs_tokenizer=False),
        Format(
            ("context", "choices"),
            "questions as `radix-ops score` reads them: the context with each choice, without its last token",
            scoring.parse_item,
            scoring.encode,
        ),
        Format(
            ("query", "documents"),
            "queries as `radix-ops rerank` reads them: the query with each document",
            parse_query,
            encode_queries,
        ),
        Format(
            ("prompt", "chosen", "rejected"),
            "preferences: the prompt with each of its two answers",
            lambda record: _parse_answers(record, "chosen", "rejected"),
            _encode_lines,
        ),
        Format(
            ("prompt", "completion"),
            "prompts with their completions",
            lambda record: _parse_answers(record, "completion"),
            _encode_lines,
        ),
        Format(("messages",), "conversations, by the tokenizer's chat template", _parse_messages, _encode_lines),
        Format(
            (text_key,),
            "texts, each behind the prompt" if prompt else "texts",
            lambda record: _Line(record.where, [prompt + record.text(text_key)]),
            _encode_lines,
        ),
    ]


def packed_arrays(path: str) -> Items:
    """Return the sequences of a .npz file, an item each; see `packed_ids`."""
    items = Items()
    items.store = packed_ids(path)
    return items


def _parse_ids(record: Record) -> np.ndarray:
    ids, where = record.fields.get("input_ids"), f'{record.where}: "input_ids"'
    if not isinstance(ids, list):
        found = kind_of(ids) if "input_ids" in record.fields else "missing"
        raise UserError(f"{where} is {found}; it must be an array of token ids")
    if set(map(type, ids)) - {int}:
        index = next(i for i, token in enumerate(ids) if type(token) is not int)
        raise UserError(f"{where}[{index}] is not a token id but {kind_of(ids[index])}")
    if ids and (min(ids) < 0 or max(ids) > _MAX_ID):
        index = next(i for i, token in enumerate(ids) if not 0 <= token <= _MAX_ID)
        raise UserError(f"{where}[{index}] is {ids[index]}; a token id is from 0 to {_MAX_ID}")
    return np.array(ids, np.int32)


def _encode_ids(lines: Iterable[np.ndarray], tokenizer) -> Items:
    items = Items()
    for ids in lines:
        items.append([ids])
    return items


@dataclass(frozen=True)
class _Line:
    """The contents of a line: texts, or conversations, which the tokenizer's chat template makes texts of."""

    where: str
    contents: list[Any]
    tools: list | None = None

    @property
    def is_chat(self) -> bool:
        return isinstance(self.contents[0], list)


def _parse_messages(record: Record) -> _Line:
    return _Line(record.where, [_messages(record, "messages")], _tools(record))


def _parse_answers(record: Record, *answers: str) -> _Line:
    """Return a prompt with each of its answers: strings, or messages where the prompt is an array."""
    if isinstance(record.fields.get("prompt"), list):
        chat = _messages(record, "prompt")
        return _Line(record.where, [chat + _messages(record, key) for key in answers], _tools(record))
    prompt = record.text("prompt")
    return _Line(record.where, [prompt + record.text(key) for key in answers])


def _messages(record: Record, key: str) -> list[dict]:
    messages, where = record.fields.get(key), f'{record.where}: "{key}"'
    if not isinstance(messages, list) or not messages:
        found = "an empty array" if messages == [] else kind_of(messages) if key in record.fields else "missing"
        raise UserError(f"{where} is {found}; it must be an array of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f'{where}[{index}] must be an object with a "role"')
        if isinstance(message.get("content"), str):
            check_text(message["content"], f"{where}[{index}].content")
    return messages


def _tools(record: Record) -> list | None:
    tools = record.fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f'{record.where}: "tools" is {kind_of(tools)}; it must be an array of tools')
    return tools


def _encode_lines(lines: Iterable[_Line], tokenizer) -> Items:
    """Tokenise texts with special tokens around them; what a chat template writes has its own."""
    items, lines = Items(), iter(lines)
    while part := list(itertools.islice(lines, _LINES_AT_ONCE)):
        texts = [text for line in part if not line.is_chat for text in line.contents]
        chats = [text for line in part if line.is_chat for text in _rendered(line, tokenizer)]
        of_texts, of_chats = iter(_tokenize(tokenizer, texts, True)), iter(_tokenize(tokenizer, chats, False))
        for line in part:
            items.append(itertools.islice(of_chats if line.is_chat else of_texts, len(line.contents)))
    return items


def _tokenize(tokenizer, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    with in_turn(tokenizer):
        return tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"] if texts else []


def _rendered(line: _Line, tokenizer) -> list[str]:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{line.where} holds messages, and the tokenizer has no chat template")
    try:
        texts = [tokenizer.apply_chat_template(chat, tools=line.tools, tokenize=False) for chat in line.contents]
    except Exception as error:  # whatever a template does
        raise UserError(f"{line.where}: the chat template can't render the messages: {error}") from error
    return [check_text(text, f"{line.where}: what the chat template writes") for text in texts]
