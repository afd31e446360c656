"""Scoring: the log-probability of each choice behind its context, or of the windows of a text.

The data flows one way: `parse_item` (of an input line) -> `encode` (token ids) -> `score` (planned batches, hidden
states, then logits of scored tokens only) -> `result` (one output object an item). Plain and folded runs share every
step but the plan and the fold.
"""

from __future__ import annotations

import array
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plan.budget import Budget
from .batches import Compute, OnBatch, RunStats, run
from .errors import TooLong, UserError
from .inputs import Record, check_text
from .items import Items, first_equals
from .prompts import check_choices, gold_of, with_context
from .runners import Runner
from .tokenizing import in_turn

MAX_LOGIT_BYTES = 64 * 2**20  # of logits that are held at a time
RESERVED_KEYS = ("logprobs", "tokens", "greedy", "best", "best_per_char")
SHAPE = 'one object {"context": ..., "choices": [...]}, {"question": ..., "choices": [...]} or {"text": ...} a line'
_ITEMS_AT_ONCE = 256  # contexts for one call of the tokenizer
_TEXTS_AT_ONCE, _CHARACTERS_AT_ONCE = 1024, 2**22  # contexts with their choices, likewise


@dataclass(frozen=True)
class Item:
    """One question; `where` names it in messages, `extra` holds all other keys."""

    where: str
    context: str
    choices: list[str]
    extra: dict


class Choices(Items):
    """The choices of all items as token sequences: context, then choice. A model reads all tokens but the last."""

    def __init__(self):
        super().__init__()
        self._context_lengths = array.array("i")

    def append(self, sequences: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Add an item of (context, choice) pairs of token ids, int32."""
        sequences = list(sequences)
        self._context_lengths.extend(len(context) for context, _ in sequences)
        super().append(np.concatenate(pair) for pair in sequences)

    def parts(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (context, choice) of a sequence."""
        ids, size = self.store[sequence], self._context_lengths[sequence]
        return ids[:size], ids[size:]

    def __getitem__(self, item: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.parts(sequence) for sequence in self.of(item)]

    def tokens(self, item: int) -> list[np.ndarray]:
        return [ids for pair in self[item] for ids in pair]

    @property
    def lengths(self) -> np.ndarray:
        return self.store.lengths - 1


def parse_item(record: Record, letters: bool = False, in_chat: bool = False) -> Item:
    """Return the item of {"context": str, "choices": [str, ...], ...}, or of a question as `with_context` has it.

    Among its other keys, "gold" is an index, as `gold_of` finds it. UserError for anything else.
    """
    if letters and "context" in record.fields:
        raise UserError(f'{record.where} has the key "context"; --letters asks a "question" with its "choices" alone')
    if letters or ("question" in record.fields and "context" not in record.fields):
        record = with_context(record, letters, in_chat)
    context, choices = record.text("context"), check_choices(record)
    extra, gold = record.others(("context", "choices"), RESERVED_KEYS), gold_of(record, choices)
    return Item(record.where, context, choices, extra | {"gold": gold} if "gold" in extra else extra)


def encode(
    items: Iterable[Item],
    tokenizer,
    max_length: int | None = None,
    truncate_left: bool = False,
    prompt: Callable[[str], str] | None = None,
) -> Choices:
    """Return the token ids of every (context, choice) pair, split as lm-evaluation-harness 0.4.13 splits them.

    Trailing white space of the context counts as the continuation's. The continuation is what the encoding of the
    whole text has behind as many tokens as the context alone encodes to. Special tokens are the tokenizer's
    default, left out where the text itself starts with the prefix token (BOS, or EOS without one). A context of no
    tokens becomes the prefix token, which a choice that starts with it brings along itself.

    UserError where a choice yields no token, and where the model would read more than `max_length` tokens; with
    `truncate_left` such a sequence loses context on its left instead, and only a continuation too long is an error.

    prompt: makes the text that stands before a choice of an item's context, and brings all special tokens along.
    """
    prefix_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prefix_text = None if prefix_id is None else tokenizer.decode(prefix_id)
    encoded, items = Choices(), iter(items)
    special = prompt is None
    while part := list(itertools.islice(items, _ITEMS_AT_ONCE)):
        if prompt is not None:
            part = [_prompted(item, prompt) for item in part]
        contexts = encode_texts(tokenizer, [item.context.rstrip() for item in part], prefix_text, special)
        texts = (item.context + choice for item in part if item.context for choice in item.choices)
        wholes = _encode_many(tokenizer, texts, prefix_text, special)
        bare = _encode_many(tokenizer, (c for i in part if not i.context for c in i.choices), None, False)
        for item, context in zip(part, contexts, strict=True):
            # An empty context takes no special tokens along: the prefix token stands in for them.
            before = np.asarray(context if item.context else [], dtype=np.int32)
            pairs = []
            for number in range(len(item.choices)):
                rest = np.asarray(next(wholes if item.context else bare)[len(before) :], dtype=np.int32)
                given, rest = (before, rest) if len(before) else _add_prefix(item, rest, prefix_id)
                pairs.append(_fit(f"{item.where}: choices[{number}]", given, rest, max_length, truncate_left))
            encoded.append(pairs)
    return encoded


def _prompted(item: Item, prompt: Callable[[str], str]) -> Item:
    try:
        context = prompt(item.context)
    except UserError as error:
        raise UserError(f"{item.where}: {error}") from error
    return replace(item, context=check_text(context, f"{item.where}: what the chat template writes"))


def _encode_many(tokenizer, texts: Iterable[str], *options) -> Iterator[list[int]]:
    """Yield what encode_texts makes, of a few texts at a time: a long context stands before each of its choices."""
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if len(part) == _TEXTS_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
            yield from encode_texts(tokenizer, part, *options)
            part, size = [], 0
    yield from encode_texts(tokenizer, part, *options)


def encode_texts(tokenizer, texts: list[str], prefix_text: str | None, special: bool = True) -> list[list[int]]:
    """Return the token ids of texts, with `special` tokens around those that don't start with the prefix themselves."""
    encoded: list[list[int]] = [[]] * len(texts)
    has_prefix = [prefix_text is not None and text.startswith(prefix_text) for text in texts]
    for flag in (False, True):
        chosen = [index for index in range(len(texts)) if has_prefix[index] == flag]
        if chosen:
            with in_turn(tokenizer):
                batch = tokenizer([texts[i] for i in chosen], add_special_tokens=special and not flag, verbose=False)
            for index, ids in zip(chosen, batch["input_ids"], strict=True):
                encoded[index] = ids
    return encoded


def _add_prefix(item: Item, rest: np.ndarray, prefix_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    if prefix_id is None:
        raise UserError(f"{item.where}: the context yields no tokens, and the tokenizer has neither BOS nor EOS")
    if len(rest) and rest[0] == prefix_id:
        return rest[:1], rest[1:]
    return np.asarray([prefix_id], dtype=np.int32), rest


def _fit(where: str, context, continuation, max_length: int | None, truncate_left: bool):
    if not len(continuation):
        raise UserError(f"{where} yields no token of its own; a choice must add at least one to its context")
    extra = 0 if max_length is None else len(context) + len(continuation) - 1 - max_length
    if max_length is not None and extra > 0 and not truncate_left:
        raise TooLong(
            f"{where} needs {max_length + extra} tokens of input and the model reads at most {max_length}; "
            "--truncate-left drops tokens from the start of the context"
        )
    if extra >= len(context):
        raise TooLong(f"{where} has {len(continuation)} tokens and the model reads at most {max_length}")
    return (context[extra:] if extra > 0 else context), continuation


def score(
    runner: Runner, choices: Choices, budget: Budget, folded: bool, on_batch: OnBatch | None = None, warm_up=False
) -> RunStats:
    """Score all choices by a runner of a causal language model that `check` accepted; see `scorer` and `run`."""
    return run(runner, choices, budget, folded, scorer(runner, choices), on_batch, warm_up)


def scorer(runner: Runner, choices: Choices) -> Compute:
    """Return a function of (indices, inputs) that computes each sequence's log-probability of its choice (float64
    array) and whether greedy decoding would write it (bool array)."""
    ends = choices.ends

    def compute(indices: np.ndarray, inputs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        targets = [choices.parts(i)[1] for i in indices]
        contexts = [ids[: len(ids) + 1 - len(choice)] for ids, choice in zip(inputs, targets, strict=True)]
        starts = np.cumsum([0] + [len(ids) for ids in inputs[:-1]])
        tokens, row_of = _head_rows(np.searchsorted(ends, indices, "right"), contexts, targets, starts)
        rows = runner.states(inputs, tokens).at(tokens)
        logprobs, greedy = score_targets(
            lambda first, end: runner.head(rows[first:end]).float(),
            runner.head.weight.shape[0],
            row_of,
            np.concatenate(targets),
        )
        runner.head_rows += len(tokens)
        firsts = np.cumsum([0] + [len(choice) for choice in targets[:-1]])
        sums = np.add.reduceat(logprobs.double().numpy(), firsts)
        return sums, np.logical_and.reduceat(greedy.numpy(), firsts)

    return compute


def _head_rows(items, contexts: list[np.ndarray], targets, starts) -> tuple[np.ndarray, np.ndarray]:
    """Return the packed tokens of the batch that need logits, and for each scored token which of them predicts it.

    Choices of one item that start alike share those tokens: a small trie for each of its contexts, which may be cut to
    several lengths, or be a text's windows.
    """
    nodes: dict[tuple[int, Any], int] = {}
    tokens: list[int] = []
    row_of: list[int] = []
    for item, context, choice, start in zip(items.tolist(), contexts, targets, starts.tolist(), strict=True):
        # A root's first part is negative.
        key: tuple[int, Any] = (-1 - item, context.tobytes())
        for offset, token in enumerate(choice.tolist()):
            row = nodes.setdefault(key, len(tokens))
            if row == len(tokens):
                tokens.append(start + len(context) - 1 + offset)
            row_of.append(row)
            key = (row, token)
    return np.asarray(tokens, dtype=np.int64), np.asarray(row_of, dtype=np.int64)


def score_targets(
    logits_of: Callable[[int, int], Tensor],
    vocab_size: int,
    row_of: np.ndarray,
    targets: np.ndarray,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target and whether none is larger, [T] on the CPU.

    `logits_of(first, end)` makes logits [end - first, vocab_size] of some rows, of which targets[i] is predicted by row
    row_of[i]; each row has a target. Logits of MAX_LOGIT_BYTES in float32 are held at a time. Log-probabilities are of
    `dtype`, by default the logits'.
    """
    order = np.argsort(row_of, kind="stable")
    row_of, targets = row_of[order], targets[order].astype(np.int64)
    logprobs, is_likeliest = [], []
    size, num_rows = max(1, MAX_LOGIT_BYTES // (4 * vocab_size)), int(row_of[-1]) + 1
    for first in range(0, num_rows, size):
        end = min(first + size, num_rows)
        scores = torch.log_softmax(logits_of(first, end), dim=-1, dtype=dtype)
        chosen = slice(*np.searchsorted(row_of, [first, end]))
        row = torch.from_numpy(row_of[chosen] - first).to(scores.device)
        target = torch.from_numpy(targets[chosen]).to(scores.device)
        logprobs.append(scores[row, target])
        is_likeliest.append(scores.argmax(-1)[row] == target)
    back = torch.from_numpy(np.argsort(order, kind="stable"))
    return torch.cat(logprobs).cpu()[back], torch.cat(is_likeliest).cpu()[back]


def result(item: Item, num_tokens: list[int], logprobs: np.ndarray, greedy: np.ndarray) -> dict:
    """Return an item's output object; `best_per_char` divides by characters without leading white space (acc_norm).

    Equal choices get what the first of them did, which rounding may set apart where they ran in different batches; the
    first is the best of them. UserError for a log-probability that isn't finite.
    """
    first = first_equals(item.choices)
    logprobs, greedy = logprobs[first], greedy[first]
    for number, value in enumerate(logprobs.tolist()):
        if not math.isfinite(value):
            raise UserError(f"{item.where}: choices[{number}] got the log-probability {value}; try --dtype float32")
    lengths = [max(1, len(choice.lstrip())) for choice in item.choices]
    return {
        **item.extra,
        "logprobs": logprobs.tolist(),
        "tokens": num_tokens,
        "greedy": greedy.tolist(),
        "best": int(np.argmax(logprobs)),
        "best_per_char": int(np.argmax(logprobs / lengths)),
    }
