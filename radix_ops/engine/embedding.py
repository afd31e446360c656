"""Embeddings of texts by a causal model: token ids, pooling, normalisation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.nn import functional as F

from .errors import UserError
from .inputs import Record
from .items import Items
from .messages import Chat
from .recipes import Recipe

RESERVED_KEYS = ("line", "key", "embedding")
_TEXTS_AT_ONCE = 1024  # given to the tokenizer


@dataclass(frozen=True)
class Text:
    """One input line; `where` names file and line for messages, `extra` holds all other keys."""

    line: int
    where: str
    text: str
    extra: dict


def parse_text(key: str) -> Callable[[Record], Text]:
    """A parser of {key: str, ...}."""

    def parse(record: Record) -> Text:
        return Text(record.line, record.where, record.text(key), record.others((key,), RESERVED_KEYS))

    return parse


def encode(texts: Iterable[Text], tokenizer, recipe: Recipe, truncate_right: bool) -> Items:
    """Token ids of prompt and text, with the special tokens that the tokenizer puts around a text, or as the recipe's
    messages, which its chat template renders.

    A text of more than `recipe.max_length` tokens is a UserError or, with `truncate_right`, loses its end; special
    tokens behind it stay. So is one of no tokens, and one that leaves a mean nothing behind its prompt.
    """
    encoded, texts, skip = Items(), iter(texts), tokens_to_skip(tokenizer, recipe)
    make = _as_messages if recipe.messages else _as_texts
    while part := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
        for text, ids in zip(part, make(part, tokenizer, recipe, truncate_right), strict=True):
            if not ids:
                raise UserError(f"{text.where} yields no tokens, so it has no embedding")
            if recipe.max_length is not None and len(ids) > recipe.max_length:
                raise UserError(
                    f"{text.where} has {len(ids)} tokens and the most are {recipe.max_length}; "
                    "--truncate-right drops tokens from its end"
                )
            if len(ids) <= skip:
                raise UserError(
                    f"{text.where} has no tokens behind the prompt, and the model's mean leaves the prompt out"
                )
            encoded.append([ids])
    return encoded


def _as_texts(texts: list[Text], tokenizer, recipe: Recipe, truncate_right: bool) -> list[list[int]]:
    num_special = tokenizer.num_special_tokens_to_add()
    if recipe.max_length is not None and recipe.max_length <= num_special:
        raise UserError(f"--max-length {recipe.max_length} leaves no room beside {num_special} special tokens")
    options = {"verbose": False}
    if truncate_right and recipe.max_length is not None:
        tokenizer.truncation_side = "right"
        options |= {"truncation": True, "max_length": recipe.max_length}
    return tokenizer([recipe.prompt + text.text for text in texts], **options)["input_ids"]


def _as_messages(texts: list[Text], tokenizer, recipe: Recipe, truncate_right: bool) -> Iterator[list[int]]:
    chat = Chat(tokenizer, recipe.messages, recipe.prompt)
    turns = [[("user", text.text)] for text in texts]
    for text, turn, ids in zip(texts, turns, chat.ids(turns), strict=True):
        is_long = truncate_right and recipe.max_length is not None and len(ids) > recipe.max_length
        yield chat.cut(ids, turn, recipe.max_length, text.where) if is_long else ids


def tokens_to_skip(tokenizer, recipe: Recipe) -> int:
    """The tokens of the prompt that a mean leaves out, counted as sentence-transformers does."""
    if recipe.pools_prompt or recipe.pooling != "mean" or not recipe.prompt:
        return 0
    ids = tokenizer(recipe.prompt)["input_ids"]
    return len(ids) - (bool(ids) and ids[-1] in tokenizer.all_special_ids)


def embedder(runner, recipe: Recipe, skip: int) -> Callable[[np.ndarray, list[np.ndarray]], np.ndarray]:
    """A function of (indices, sequences) that returns their embeddings, float32 [len(sequences), dim].

    Pooled states are normalised in fp32, before or after they are cut to `recipe.dim` numbers.
    """

    def compute(indices: np.ndarray, sequences: list[np.ndarray]) -> np.ndarray:
        states = runner.states(sequences)
        pooled = states.last() if recipe.pooling == "last" else states.mean(skip)
        pooled = pooled.float()[:, : None if recipe.cuts_last else recipe.dim]
        embeddings = F.normalize(pooled, dim=-1) if recipe.normalize else pooled
        return embeddings[:, : recipe.dim].cpu().numpy()

    return compute


def numbers(row: np.ndarray) -> list[float]:
    """float32 numbers as the shortest decimals that read back as them."""
    return [float(text) for text in row.astype("U")]
