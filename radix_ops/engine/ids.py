"""Records that hold token ids: items whose sequences are known, so that no tokenizer reads them.

{"input_ids": [...]} is a text to `embed`, a text or a prompt to `classify`, and a whole text to `score`, whose first
token is given; of {"input_ids": [[...], ...]} each is the whole prompt of a document to `rerank`; {"context_ids":
[...], "choices_ids": [[...], ...]} is a question.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import classifying, embedding, reranking, rolling, scoring
from .errors import TooLong, UserError
from .inputs import Record, kind_of
from .items import Items
from .prompts import gold_of

MAX_ID = 2**31 - 1
_OF_TEXT = ("best_per_char", "words", "bytes", "texts")  # what a result says of texts alone
_BESIDE = ("attention_mask", "token_type_ids")  # what a tokenizer puts beside ids


@dataclass(frozen=True, kw_only=True)
class Given:
    """An item whose token sequences are known; where it has texts, they name its ids."""

    sequences: tuple[Any, ...]  # as the item's store takes them


@dataclass(frozen=True)
class GivenText(Given, embedding.Text):
    pass


@dataclass(frozen=True)
class GivenQuery(Given, reranking.Query):
    pass


@dataclass(frozen=True)
class GivenRow(Given, classifying.Row):
    pass


@dataclass(frozen=True)
class GivenItem(Given, scoring.Item):
    pass


@dataclass(frozen=True)
class GivenWhole(Given, rolling.Text):
    pass


@dataclass(frozen=True)
class Limits:
    """The limits of a model, and what goes beyond them."""

    vocab_size: int | None = None  # how many tokens it has
    max_length: int | None = None  # tokens that it reads at most
    stride: int | None = None  # tokens that each further window over a text asks for


def holds_ids(record: Record, task: str) -> bool:
    """Return whether a record holds ids that the task reads."""
    return "input_ids" in record.fields or (task == "score" and "context_ids" in record.fields)


def parse_text(record: Record, limits: Limits) -> GivenText:
    """Return the item of {"input_ids": [...]}: a text for an embedding. UserError for ids that can't be used."""
    ids = ids_of(record, limits.vocab_size)
    if not len(ids):
        raise UserError(f'{record.where}: "input_ids" holds no tokens, so it has no embedding')
    _check_length(len(ids), f'{record.where}: "input_ids"', limits)
    extra = record.others(("input_ids", *_BESIDE), embedding.RESERVED_KEYS)
    return GivenText(record.where, "", extra, sequences=((ids, 0),))


def parse_query(record: Record, limits: Limits) -> GivenQuery:
    """Return the item of {"input_ids": [[...], ...]}, a prompt for each document; an array of ids is that of one."""
    prompts = many_ids_of(record, limits.vocab_size)
    for index, ids in enumerate(prompts):
        where = f"{record.where}: input_ids[{index}]"
        if not len(ids):
            raise UserError(f"{where} holds no tokens")
        _check_length(len(ids), where, limits)
    extra = record.others(("input_ids", *_BESIDE), reranking.RESERVED_KEYS)
    reranking.check_judgement(record.where, extra, len(prompts))
    return GivenQuery(record.where, "", [_name_of(ids) for ids in prompts], None, extra, sequences=tuple(prompts))


def parse_question(record: Record, limits: Limits) -> GivenItem | GivenWhole:
    """Return the item of {"context_ids": [...], "choices_ids": [[...], ...]}, or of {"input_ids": [...]}: a whole text,
    whose first token is given, in windows where the limits have a stride."""
    if "context_ids" not in record.fields:
        return _parse_whole(record, limits)
    context = _checked(record.fields["context_ids"], f'{record.where}: "context_ids"', limits.vocab_size)
    choices = _checked_arrays(record, "choices_ids", limits.vocab_size)
    if not len(context):
        raise UserError(f'{record.where}: "context_ids" holds no tokens; a choice is scored behind one at least')
    if not choices:
        raise UserError(f'{record.where}: "choices_ids" is an empty array; it must hold at least one array of ids')
    for index, choice in enumerate(choices):
        where = f"{record.where}: choices_ids[{index}]"
        if not len(choice):
            raise UserError(f"{where} holds no token to score")
        _check_length(len(context) + len(choice) - 1, where, limits)
    names = [_name_of(choice) for choice in choices]
    gold, extra = gold_of(record, names), record.others(("context_ids", "choices_ids"), scoring.RESERVED_KEYS)
    extra |= {"gold": gold} if "gold" in extra else {}
    return GivenItem(record.where, "", names, extra, sequences=tuple((context, choice) for choice in choices))


def _parse_whole(record: Record, limits: Limits) -> GivenWhole:
    ids, where = ids_of(record, limits.vocab_size), f'{record.where}: "input_ids"'
    if len(ids) < 2:
        raise UserError(f"{where} holds no token to score, which stands behind another one")
    if limits.stride is None:
        _check_length(len(ids) - 1, where, limits, "--stride N scores it in windows, each of which asks for N more")
    windows = rolling.windows(ids[:1], ids[1:], limits.max_length or len(ids), limits.stride or 1)
    extra = record.others(("input_ids", *_BESIDE), rolling.RESERVED_KEYS)
    return GivenWhole(record.where, "", extra, sequences=tuple(windows))


def parse_row(record: Record, limits: Limits) -> GivenRow:
    """Return the row of {"input_ids": [...]}: a text, a pair or a prompt that is classified."""
    ids, where = ids_of(record, limits.vocab_size), f'{record.where}: "input_ids"'
    text = next((key for key in ("text", "messages") if key in record.fields), None)
    if text is not None:
        raise UserError(f'{record.where} has "input_ids" and "{text}"; leave out the one that is not to be read')
    if not len(ids):
        raise UserError(f"{where} holds no tokens")
    _check_length(len(ids), where, limits)
    extra = record.others(("input_ids", *_BESIDE), classifying.RESERVED_KEYS)
    return GivenRow(record.where, None, extra, sequences=(ids,))


PARSERS = {"classify": parse_row, "embed": parse_text, "rerank": parse_query, "score": parse_question}
_STORES: dict[type[Given], type[Items]] = {
    GivenItem: scoring.Choices,
    GivenWhole: scoring.Choices,
    GivenText: embedding.Texts,
    GivenQuery: Items,
    GivenRow: Items,
}


def encode_each(items: Iterable, encode_texts: Callable[[Iterable], Items]) -> Any:
    """Return the sequences of items of one task in order; `encode_texts` makes those of texts."""
    encoded: Items | None = None
    for is_given, part in itertools.groupby(items, lambda item: isinstance(item, Given)):
        found = (encode if is_given else encode_texts)(part)
        if encoded is None:
            encoded = found
        else:
            encoded.extend(found)
    return encode_texts(()) if encoded is None else encoded


def encode(items: Iterable[Given]) -> Items:
    """Return the sequences of items of one task, one at least."""
    store: Items | None = None
    for item in items:
        if store is None:
            store = _STORES[type(item)]()
        store.append(item.sequences)
    assert store is not None
    return store


def without_texts(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result without what it says of texts, which ids have none of."""
    return {key: value for key, value in result.items() if key not in _OF_TEXT}


def ids_of(record: Record, vocab_size: int | None = None) -> np.ndarray:
    """Return the ids of {"input_ids": [...]}, int32, without the padding at either end that an "attention_mask" names.

    UserError for what is no array of ids, for an id that is none of `vocab_size`, for a mask with a hole and for
    "token_type_ids" other than 0.
    """
    where = f'{record.where}: "input_ids"'
    ids = _checked(record.fields.get("input_ids"), where, vocab_size)
    return ids[_kept(record, len(ids), where)]


def many_ids_of(record: Record, vocab_size: int | None = None) -> list[np.ndarray]:
    """Return the ids of {"input_ids": [[...], ...]}, or the one array of {"input_ids": [...]}, as `ids_of`."""
    given = record.fields["input_ids"]
    if not _is_array(given) or (len(given) and not _is_array(given[0])):
        return [ids_of(record, vocab_size)]
    found = _checked_arrays(record, "input_ids", vocab_size)
    beside = {key: record.fields[key] for key in _BESIDE if record.fields.get(key) is not None}
    for key, marks in beside.items():
        if not _is_array(marks) or len(marks) != len(found):
            raise UserError(f'{record.where}: "{key}" must hold an array for each of the {len(found)} of input_ids')
    kept = []
    for index, ids in enumerate(found):
        part = Record(f"{record.where}: input_ids[{index}]", {key: marks[index] for key, marks in beside.items()})
        kept.append(ids[_kept(part, len(ids), part.where)])
    return kept


def _checked_arrays(record: Record, key: str, vocab_size: int | None) -> list[np.ndarray]:
    given: Any = record.fields.get(key)
    if not _is_array(given):
        found = kind_of(given) if key in record.fields else "missing"
        raise UserError(f'{record.where}: "{key}" is {found}; it must be an array of arrays of token ids')
    return [_checked(ids, f"{record.where}: {key}[{index}]", vocab_size) for index, ids in enumerate(given)]


def _is_array(value) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _checked(ids, where: str, vocab_size: int | None) -> np.ndarray:
    if not _is_array(ids):
        found = "missing" if ids is None else kind_of(ids)
        raise UserError(f"{where} is {found}; it must be an array of token ids")
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(
                f"{where} is an array of {ids.ndim} dimensions of {ids.dtype}; it must be one of whole numbers"
            )
        ids = ids.tolist()
    if set(map(type, ids)) - {int}:
        index = next(i for i, token in enumerate(ids) if type(token) is not int)
        raise UserError(f"{where}[{index}] is not a token id but {kind_of(ids[index])}")
    last = MAX_ID if vocab_size is None else vocab_size - 1
    if ids and (min(ids) < 0 or max(ids) > last):
        index = next(i for i, token in enumerate(ids) if not 0 <= token <= last)
        whose = "a token id is" if vocab_size is None else "the model's token ids are"
        raise UserError(f"{where}[{index}] is {ids[index]}; {whose} from 0 to {last}")
    return np.array(ids, np.int32)


def _kept(record: Record, count: int, where: str) -> slice:
    """Return which of `count` tokens the record's attention_mask keeps."""
    mask, types = (record.fields.get(key) for key in _BESIDE)
    for key, marks in zip(_BESIDE, (mask, types), strict=True):
        if marks is None:
            continue
        if not _is_array(marks) or len(marks) != count or not all(mark in (0, 1) for mark in marks):
            raise UserError(f"{where} has {count} tokens, and its {key} must hold as many of 0 and 1")
    if types is not None and any(types):
        raise UserError(f"{where} has token_type_ids other than 0, which folding can't pass on to a model")
    if mask is None:
        return slice(0, count)
    places = [place for place, mark in enumerate(mask) if mark]
    if not places:
        return slice(0, 0)
    if places[-1] - places[0] + 1 != len(places):
        raise UserError(f"{where} has an attention_mask with a hole; padding stands at the ends of a sequence")
    return slice(places[0], places[-1] + 1)


def _check_length(length: int, where: str, limits: Limits, remedy: str = "ids are never cut") -> None:
    if limits.max_length is not None and length > limits.max_length:
        raise TooLong(
            f"{where} makes {length} tokens of input and the model reads at most {limits.max_length}; {remedy}"
        )


def _name_of(ids: np.ndarray) -> str:
    return " ".join(map(str, ids.tolist()))
