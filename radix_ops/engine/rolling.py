"""Whole texts: the log-probability of all their tokens, in windows where the model reads fewer at a time."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .errors import TooLong, UserError
from .inputs import Record
from .scoring import Choices, encode_texts

RESERVED_KEYS = ("logprob", "tokens", "words", "bytes", "perplexity")
_TEXTS_AT_ONCE = 128  # given to the tokenizer


@dataclass(frozen=True)
class Text:
    """One text; `where` names it in messages, `extra` holds all other keys."""

    where: str
    text: str
    extra: dict


def is_text(record: Record) -> bool:
    """Return whether a record holds a text, and no question."""
    return "text" in record.fields and record.fields.keys().isdisjoint(("context", "question", "choices"))


def parse_text(record: Record) -> Text:
    """Return the item of {"text": str, ...}. UserError for anything else."""
    return Text(record.where, record.text("text"), record.others(("text",), RESERVED_KEYS))


def encode(texts: Iterable[Text], tokenizer, max_length: int | None = None, stride: int | None = None) -> Choices:
    """Return the windows of each text, as pairs of tokens that the model reads first and those that it is asked for,
    which lm-evaluation-harness 0.4.13 rolls over it.

    A text's tokens, without special ones, stand behind the prefix token (BOS, or EOS without one), which a text that
    starts with it brings along itself. A tokenizer that has neither leaves the first token without a context, so it is
    not scored. The first window asks for `max_length` tokens, and each further one for `stride` more, behind as many
    of those before them as a model that reads `max_length` tokens has room for. Without a stride a text that needs
    more than one window is a UserError.
    """
    prefix_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    encoded, texts = Choices(), iter(texts)
    while part := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
        for item, ids in zip(part, encode_texts(tokenizer, [i.text for i in part], None, False), strict=True):
            tokens = np.asarray(ids, np.int32)
            if prefix_id is None or (len(tokens) and tokens[0] == prefix_id):
                prefix, tokens = tokens[:1], tokens[1:]
            else:
                prefix = np.asarray([prefix_id], np.int32)
            if max_length is not None and len(tokens) > max_length and stride is None:
                raise TooLong(
                    f"{item.where} has {len(tokens):,} tokens and the model reads at most {max_length:,}; --stride N "
                    "scores it in windows, each of which asks for N more"
                )
            encoded.append(windows(prefix, tokens, max_length or len(tokens), stride or 1))
    return encoded


def windows(prefix: np.ndarray, tokens: np.ndarray, size: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (context, asked for) of a text's tokens behind a prefix, together of `size` + 1 tokens at most; the second
    parts are all tokens in turn."""
    if len(tokens):
        yield prefix, tokens[:size]
    for start in range(size, len(tokens), stride):
        end = min(start + stride, len(tokens))
        yield tokens[end - size - 1 : start], tokens[start:end]


def result(item: Text, num_tokens: list[int], logprobs: np.ndarray) -> dict:
    """Return a text's output object, of its windows' tokens and log-probabilities.

    Words are counted as lm-evaluation-harness counts them. Perplexity is a token's, None where there is none or a float
    can't hold it. UserError for a log-probability that isn't finite.
    """
    logprob, tokens = math.fsum(logprobs.tolist()), sum(num_tokens)
    if not math.isfinite(logprob):
        raise UserError(f"{item.where} got the log-probability {logprob}; try --dtype float32")
    return {
        **item.extra,
        "logprob": logprob,
        "tokens": tokens,
        "words": len(re.split(r"\s+", item.text)),
        "bytes": len(item.text.encode("utf-8")),
        "perplexity": perplexity_of(logprob, tokens),
    }


def perplexity_of(logprob: float, count: int) -> float | None:
    """Return exp(-logprob / count); None where nothing was counted, or a float can't hold it."""
    try:
        return math.exp(-logprob / count) if count else None
    except OverflowError:
        return None
