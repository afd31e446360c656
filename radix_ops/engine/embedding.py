"""Embeddings of texts by a causal model: token ids, pooling, normalisation."""

from __future__ import annotations

import array
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.nn import functional as F

from .batches import Compute
from .errors import TooLong, UserError
from .inputs import Record
from .items import Items, shortest_decimals
from .messages import Chat
from .pooling import pooled, tokens_read
from .recipes import Recipe
from .runners import Runner
from .tokenizing import cutting_right, in_turn

RESERVED_KEYS = ("embedding",)
_TEXTS_AT_ONCE = 1024  # given to the tokenizer


@dataclass(frozen=True)
class Text:
    """One text; `where` names it in messages, `extra` holds all other keys of its object."""

    where: str
    text: str
    extra: dict


class Texts(Items):
    """The texts of all items as token sequences, one an item, each with how many of its tokens poolings leave out."""

    def __init__(self):
        super().__init__()
        self._skips = array.array("q")

    def append(self, sequences: Iterable[tuple[Sequence[int] | np.ndarray, int]]) -> None:
        """Add an item of (token ids, tokens to leave out) pairs."""
        sequences = list(sequences)
        self._skips.extend(skip for _, skip in sequences)
        super().append(ids for ids, _ in sequences)

    def __getitem__(self, item: int) -> list[tuple[np.ndarray, int]]:
        return [(self.store[sequence], self._skips[sequence]) for sequence in self.of(item)]

    @property
    def skips(self) -> np.ndarray:
        """How many tokens of each sequence poolings leave out, int64 [B]."""
        return np.array(self._skips, np.int64)


def parse_text(key: str) -> Callable[[Record], Text]:
    """Return a parser of {key: str, ...}."""

    def parse(record: Record) -> Text:
        return Text(record.where, record.text(key), record.others((key,), RESERVED_KEYS))

    return parse


def encode(texts: Iterable[Text], tokenizer, recipe: Recipe, truncate_right: bool) -> Texts:
    """Return the token ids of prompt and text, with the special tokens that the tokenizer puts around a text, or as the
    recipe's messages, which its chat template renders.

    A text of more than `recipe.max_length` tokens is a UserError or, with `truncate_right`, loses its end; special
    tokens behind it stay. So is one of no tokens, and one that leaves a pooling nothing behind its prompt.
    """
    encoded, texts, skip = Texts(), iter(texts), tokens_to_skip(tokenizer, recipe)
    make = _as_messages if recipe.messages else _as_texts
    while part := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
        for text, ids in zip(part, make(part, tokenizer, recipe, truncate_right), strict=True):
            if not ids:
                raise UserError(f"{text.where} yields no tokens, so it has no embedding")
            if recipe.max_length is not None and len(ids) > recipe.max_length:
                raise TooLong(
                    f"{text.where} has {len(ids)} tokens and the most are {recipe.max_length}; "
                    "--truncate-right drops tokens from its end"
                )
            if len(ids) <= skip:
                raise UserError(
                    f"{text.where} has no tokens behind the prompt, and the model's pooling leaves the prompt out"
                )
            encoded.append([(ids, skip)])
    return encoded


def _as_texts(texts: list[Text], tokenizer, recipe: Recipe, truncate_right: bool) -> list[list[int]]:
    num_special = tokenizer.num_special_tokens_to_add()
    if recipe.max_length is not None and recipe.max_length <= num_special:
        raise UserError(f"--max-length {recipe.max_length} leaves no room beside {num_special} special tokens")
    options: dict[str, Any] = {"verbose": False}
    if truncate_right and recipe.max_length is not None:
        options |= {"truncation": True, "max_length": recipe.max_length}
    with cutting_right(tokenizer):
        return tokenizer([recipe.prompt + text.text for text in texts], **options)["input_ids"]


def _as_messages(texts: list[Text], tokenizer, recipe: Recipe, truncate_right: bool) -> Iterator[list[int]]:
    assert recipe.messages is not None
    chat = Chat(tokenizer, recipe.messages, recipe.prompt)
    turns = [[("user", text.text)] for text in texts]
    for text, turn, ids in zip(texts, turns, chat.ids(turns), strict=True):
        limit = recipe.max_length if truncate_right else None
        yield ids if limit is None or len(ids) <= limit else chat.cut(ids, turn, limit, text.where)


def tokens_to_skip(tokenizer, recipe: Recipe) -> int:
    """Return how many of a prompt's tokens a pooling leaves out, counted as sentence-transformers does."""
    if not recipe.skips_prompt:
        return 0
    with in_turn(tokenizer):
        ids = tokenizer(recipe.prompt)["input_ids"]
    return len(ids) - (bool(ids) and ids[-1] in tokenizer.all_special_ids)


def embedder(runner: Runner, recipe: Recipe, texts: Texts) -> Compute:
    """Return a function of (indices, inputs) that computes their embeddings, float32 [len(inputs), dim].

    Pooled states are normalised in fp32, before or after they are cut to `recipe.dim` numbers.
    """
    skips = texts.skips

    def compute(indices: np.ndarray, inputs: list[np.ndarray]) -> tuple[np.ndarray]:
        skip = skips[indices]
        tokens = tokens_read(recipe.poolings, np.array([len(ids) for ids in inputs]), skip)
        found = pooled(runner.states(inputs, tokens), recipe.poolings, skip)
        found = found[:, : None if recipe.cuts_last else recipe.dim]
        embeddings = F.normalize(found, dim=-1) if recipe.normalize else found
        return (embeddings[:, : recipe.dim].cpu().numpy(),)

    return compute


def check_finite(rows: np.ndarray, where: Callable[[int], str]) -> None:
    """UserError for an embedding with a number that isn't finite; `where(i)` names the input of row i."""
    wrong = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(wrong):
        raise UserError(f"{where(int(wrong[0]))} got an embedding that is not finite; try --dtype float32")


def result(text: Text, rows: np.ndarray) -> dict:
    """Return the output object of one text, whose embedding is rows[0], finite floats or whole numbers."""
    numbers = shortest_decimals(rows[0]) if rows.dtype.kind == "f" else rows[0].tolist()
    return {**text.extra, "embedding": numbers}
