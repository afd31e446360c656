"""The formats of a data file's lines, and the token sequences that are made of them.

parser = FormatParser(formats())
records = Records("data.jsonl", parser)  # the first line tells the format, all lines are checked
items = parser.format.encode(records, tokenizer)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..engine import blanks, embedding, ids, scoring
from ..engine.classifying import Row
from ..engine.errors import UserError
from ..engine.inputs import Record, check_text, kind_of
from ..engine.items import Items
from ..engine.label_prompts import LabelPrompt
from ..engine.label_readers import HeadReader, PromptReader, content_of
from ..engine.query_reading import QueryReading
from ..engine.recipes import Recipe
from ..engine.tokenizing import in_turn
from .ids import packed_ids

_LINES_AT_ONCE = 128  # given to the tokenizer


@dataclass(frozen=True)
class Format:
    """Lines with these keys. `parse` checks one, `encode` makes an item of each of those that it returned; `also` says
    whether a line with the keys has the format."""

    keys: tuple[str, ...]
    meaning: str  # what a line holds, and which sequences are made of it
    parse: Callable[[Record], object]
    encode: Callable[[Iterable, object], Items]
    needs_tokenizer: bool = True
    also: Callable[[dict], bool] = lambda fields: True

    @property
    def shape(self) -> str:
        return "{" + ", ".join(f'"{key}"' for key in self.keys) + "}"


class FormatParser:
    """A parser for `Records` that takes the format from the first line, unless it is given; all others must have it."""

    def __init__(self, formats: list[Format], format: Format | None = None):
        self.formats, self.format = formats, format

    def __call__(self, record: Record):
        if self.format is None:
            self.format = self._find(record)
        return self.format.parse(record)

    def _find(self, record: Record) -> Format:
        fields = record.fields
        found = next((f for f in self.formats if all(key in fields for key in f.keys) and f.also(fields)), None)
        if found is None:
            has = ", ".join(f'"{key}"' for key in list(record.fields)[:8]) or "no keys"
            known = ", ".join(dict.fromkeys(f.shape for f in self.formats))
            raise UserError(f"{record.where} has {has}; a line may have {known}")
        return found


def formats(
    text_key: str = "text",
    prompt: str = "",
    queries: QueryReading | None = None,
    letters: bool = False,
    classifies: bool = False,
    chat: Callable[[Any], Recipe] | None = None,
) -> list[Format]:
    """Return all formats, the most telling keys first.

    `prompt` stands before each text under `text_key`; `queries` says how queries are read; `letters` asks questions by
    answer letters; `classifies` reads texts as classification heads do; `chat`, of a tokenizer, reads them by a model's
    chat template.
    """
    queries, is_bare = queries or QueryReading(), text_key == "text" and not prompt and chat is None
    return [
        Format(
            ("input_ids",),
            "token ids",
            lambda record: [ids.ids_of(record)],
            _encode_ids,
            needs_tokenizer=False,
            also=lambda fields: not _are_nested(fields),
        ),
        Format(
            ("context", "choices"),
            "questions as `radix-ops score` reads them: the context with each choice, without its last token",
            scoring.parse_item,
            scoring.encode,
        ),
        Format(
            ("query", "documents"),
            "queries as `radix-ops rerank` reads them: the query with each document",
            queries.parse,
            queries.encode,
        ),
        Format(
            ("input_ids",),
            "token ids of several prompts, as `radix-ops rerank` reads them",
            ids.many_ids_of,
            _encode_ids,
            needs_tokenizer=False,
        ),
        Format(
            ("context_ids", "choices_ids"),
            "token ids of questions: the context with each choice, without its last token",
            lambda record: ids.parse_question(record, ids.Limits()),
            lambda questions, tokenizer: ids.encode(questions),
            needs_tokenizer=False,
        ),
        Format(
            ("question", "choices"),
            "questions as `radix-ops score` asks them: the question with each choice, without its last token",
            lambda record: scoring.parse_item(record, letters),
            scoring.encode,
        ),
        Format(
            ("contexts", "continuation"),
            "contexts as `radix-ops score` reads them: each with the continuation, without its last token",
            blanks.parse_blank,
            _encode_questions,
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
        *(_of_head(keys) for keys in (("text", "text_pair"), *[("text",)] * classifies) if is_bare),
        _texts(text_key, prompt) if chat is None else _chats(text_key, chat),
    ]


def _texts(key: str, prompt: str) -> Format:
    return Format(
        (key,),
        "texts, each behind the prompt" if prompt else "texts",
        lambda record: _Line(record.where, [prompt + record.text(key)]),
        _encode_lines,
    )


def _chats(key: str, chat: Callable[[Any], Recipe]) -> Format:
    """Return the format of texts that a model's chat template renders; `chat` says how, by its tokenizer."""
    return Format(
        (key,),
        "texts as `radix-ops embed` reads them, by the model's chat template",
        lambda record: embedding.Text(record.where, record.text(key), {}),
        lambda texts, tokenizer: embedding.encode(texts, tokenizer, chat(tokenizer), truncate_right=False),
    )


def _of_head(keys: tuple[str, ...]) -> Format:
    """Return the format of texts as a classification head reads them, alone or in pairs."""
    return Format(
        keys,
        "texts, or pairs of texts, as `radix-ops classify` reads them with a classification head",
        lambda record: Row(record.where, content_of(record), {}),
        lambda rows, tokenizer: HeadReader((), "", False, lambda: (tokenizer, None)).encode(rows),
    )


def label_format(prompt: LabelPrompt, tokenizer: Any) -> Format:
    """Return the format of rows that a prompt reads, as `Classifier` does for a language model."""
    reader = PromptReader(tokenizer, prompt, None)

    def parse(record: Record) -> Row:
        if not ids.holds_ids(record, "classify"):
            return reader.parse(record)
        row = ids.parse_row(record, ids.Limits())
        return replace(row, sequences=reader.sequences(row.where, row.sequences[0]))

    return Format(
        tuple(sorted(prompt.fields)) or ("text",),
        "prompts as `radix-ops classify` makes them, each with what must be read for the labels' words",
        parse,
        lambda rows, _: ids.encode_each(rows, reader.encode),
    )


def packed_arrays(path: str) -> Items:
    """Return the sequences of a .npz file, an item each; see `packed_ids`."""
    items = Items()
    items.store = packed_ids(path)
    return items


def _are_nested(fields: dict) -> bool:
    ids = fields["input_ids"]
    return isinstance(ids, list) and bool(ids) and isinstance(ids[0], list)


def _encode_ids(lines: Iterable[list[np.ndarray]], tokenizer) -> Items:
    items = Items()
    for sequences in lines:
        items.append(sequences)
    return items


def _encode_questions(questions: Iterable[scoring.Item], tokenizer) -> scoring.Choices:
    return blanks.encode(questions, lambda items: scoring.encode(items, tokenizer))


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
