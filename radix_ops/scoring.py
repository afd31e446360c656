"""Multiple-choice scoring: the log-probability of each choice behind its context.

The data flows one way: `read_items` (JSONL) -> `encode` (token ids) -> `plan_folded` or `plan_plain` (batches of
sequences) -> `run` (hidden states, then logits of scored tokens only) -> `result` (one output object an item).
Plain and folded runs share every step but the plan and the fold.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .plan import Sequence, plan_plain
from .plan import _old_plan_folded as plan_folded
from .records import UserError

TOKEN_BUDGET = 16384  # packed tokens of a batch unless the caller says otherwise
MAX_LOGIT_BYTES = 64 * 2**20  # of one chunk of fp32 logits
RESERVED_KEYS = ("line", "key", "logprobs", "tokens", "greedy", "best", "best_per_char")


class ScoreError(UserError):
    """Input that can't be scored; the message is one plain sentence for the user."""


@dataclass(frozen=True)
class Item:
    """One input line; `where` names file and line for messages, `extra` holds all other keys, `raw` its bytes."""

    line: int
    where: str
    context: str
    choices: list[str]
    extra: dict
    raw: bytes


@dataclass(frozen=True)
class ChoiceScore:
    logprob: float
    is_greedy: bool


@dataclass
class RunStats:
    """What one run did; all counts and times are measured."""

    tokens: int = 0  # packed input tokens
    rows: int = 0  # rows that went through the decoder stack, a plain run's padding included
    head_rows: int = 0  # rows that went through the language-model head
    batches: int = 0
    seconds: float = 0.0


def read_items(path: str | Path) -> list[Item]:
    """Read and check a whole JSONL file of {"context": str, "choices": [str, ...], ...}.

    Raises ScoreError naming file and line for the first line that isn't such an object.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ScoreError(f"{path} can't be read: {error.strerror or error}") from error
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise ScoreError(f'{path} is empty; it must hold one object {{"context": ..., "choices": [...]}} a line')
    return [_parse_line(raw, number, f"{path}, line {number}") for number, raw in enumerate(lines, start=1)]


def _parse_line(raw: bytes, number: int, where: str) -> Item:
    if not raw.strip():
        raise ScoreError(f"{where} is blank; each line must hold one JSON object")
    try:
        fields = json.loads(
            raw.decode("utf-8"), parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique_keys
        )
    except UnicodeDecodeError as error:
        raise ScoreError(f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise ScoreError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ScoreError(f"{where} holds {_kind(fields)}; it must hold an object with context and choices")
    for key in ("context", "choices"):
        if key not in fields:
            raise ScoreError(f'{where} has no "{key}"; it must have context (a string) and choices (strings)')
    context, choices = fields.pop("context"), fields.pop("choices")
    _check_text(context, f'{where}: "context"')
    if not isinstance(choices, list):
        raise ScoreError(f'{where}: "choices" is {_kind(choices)}; it must be an array of strings')
    if not choices:
        raise ScoreError(f'{where}: "choices" is an empty array; it must hold at least one string')
    for index, choice in enumerate(choices):
        _check_text(choice, f"{where}: choices[{index}]")
        if not choice:
            raise ScoreError(f"{where}: choices[{index}] is an empty string; a choice must hold text to score")
    clash = next((key for key in RESERVED_KEYS if key in fields), None)
    if clash:
        raise ScoreError(f'{where} has the key "{clash}", which the output uses itself; rename it')
    return Item(number, where, context, choices, fields, raw)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return fields


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def _kind(value) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _check_text(text, where: str) -> None:
    if not isinstance(text, str):
        raise ScoreError(f"{where} is {_kind(text)}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ScoreError(f"{where} holds half of a surrogate pair, which no tokenizer can read") from error


def encode(items: list[Item], tokenizer, max_length: int | None = None, truncate_left: bool = False) -> list[Sequence]:
    """Token ids of every (context, choice) pair, split as lm-evaluation-harness 0.4.13 splits them.

    Trailing white space of the context counts as the continuation's. The continuation is what the encoding of the
    whole text has behind as many tokens as the context alone encodes to. Special tokens are the tokenizer's
    default, left out where the text itself starts with the prefix token (BOS, or EOS without one). A context of no
    tokens becomes the prefix token, which a choice that starts with it brings along itself.

    ScoreError where a choice yields no token, and where the model would read more than `max_length` tokens; with
    `truncate_left` such a sequence loses context on its left instead, and only a continuation too long is an error.
    """
    prefix_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prefix_text = None if prefix_id is None else tokenizer.decode(prefix_id)
    sequences = []
    for first in range(0, len(items), 256):
        part = items[first : first + 256]
        stripped = [item.context.rstrip() for item in part]
        contexts = _encode_texts(tokenizer, stripped, prefix_text)
        wholes = iter(
            _encode_texts(tokenizer, [i.context + c for i in part if i.context for c in i.choices], prefix_text)
        )
        bare = iter(_encode_texts(tokenizer, [c for i in part if not i.context for c in i.choices], None, False))
        for index, (item, context) in enumerate(zip(part, contexts, strict=True), start=first):
            # An empty context takes no special tokens along: the prefix token stands in for them.
            context = np.asarray(context if item.context else [], dtype=np.int32)
            for number in range(len(item.choices)):
                rest = np.asarray(next(wholes if item.context else bare)[len(context) :], dtype=np.int32)
                pair = (context, rest) if len(context) else _add_prefix(item, rest, prefix_id)
                pair = _fit(f"{item.where}: choices[{number}]", *pair, max_length, truncate_left)
                sequences.append(Sequence(index, number, *pair))
    return sequences


def _encode_texts(tokenizer, texts: list[str], prefix_text: str | None, special: bool = True) -> list[list[int]]:
    encoded: list[list[int]] = [[]] * len(texts)
    has_prefix = [prefix_text is not None and text.startswith(prefix_text) for text in texts]
    for flag in (False, True):
        chosen = [index for index in range(len(texts)) if has_prefix[index] == flag]
        if chosen:
            batch = tokenizer([texts[i] for i in chosen], add_special_tokens=special and not flag, verbose=False)
            for index, ids in zip(chosen, batch["input_ids"], strict=True):
                encoded[index] = ids
    return encoded


def _add_prefix(item: Item, rest: np.ndarray, prefix_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    if prefix_id is None:
        raise ScoreError(f"{item.where}: the context yields no tokens, and the tokenizer has neither BOS nor EOS")
    if len(rest) and rest[0] == prefix_id:
        return rest[:1], rest[1:]
    return np.asarray([prefix_id], dtype=np.int32), rest


def _fit(where: str, context, continuation, max_length: int | None, truncate_left: bool):
    if not len(continuation):
        raise ScoreError(f"{where} yields no token of its own; a choice must add at least one to its context")
    extra = 0 if max_length is None else len(context) + len(continuation) - 1 - max_length
    if extra > 0 and not truncate_left:
        raise ScoreError(
            f"{where} needs {max_length + extra} tokens of input and the model reads at most {max_length}; "
            "--truncate-left drops tokens from the start of the context"
        )
    if extra >= len(context):
        raise ScoreError(f"{where} has {len(continuation)} tokens and the model reads at most {max_length}")
    return (context[extra:] if extra > 0 else context), continuation


@torch.inference_mode()
def check_model(model, sequences: list[Sequence], folded: bool) -> None:
    """ScoreError unless logits are the head on the stack's output, token ids fit, and `folded` can be had."""
    stack, head = _stack_and_head(model)
    vocab = model.get_input_embeddings().weight.shape[0]
    largest = max(max(s.context.max(), s.continuation.max()) for s in sequences)
    if largest >= vocab:
        raise ScoreError(f"the tokenizer yields token {largest} and the model embeds {vocab}: they don't fit together")
    # Logit scaling, soft caps and the like sit between head and logits in some model types.
    probe = torch.from_numpy(sequences[0].inputs[:8].astype(np.int64))[None].to(model.device)
    logits = model(input_ids=probe, use_cache=False).logits
    ours = head(stack(input_ids=probe, use_cache=False).last_hidden_state)
    if not torch.allclose(ours, logits.to(ours.dtype), rtol=1e-5, atol=1e-5, equal_nan=True):
        raise ScoreError(f"{type(model).__name__} does more to its logits than its output head, so it can't be scored")
    if folded:
        # Batches are large: the proof that folding is right for this model is a small one.
        probe = torch.cat([probe, probe.roll(1, 1)], 1).repeat(2, 1)
        probe[1, -1] = probe[0, 0]
        try:
            with _folding(model, threshold=1.0, verify="always"):
                stack(input_ids=probe, use_cache=False)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ScoreError(f"{error}; --plain scores without folding") from error


def _stack_and_head(model):
    stack, head = model.get_decoder(), model.get_output_embeddings()
    if stack is model:
        stack = model.base_model
    if stack is None or stack is model or head is None:
        raise ScoreError(f"{type(model).__name__} has no decoder stack and output head that can be called apart")
    return stack, head


def run(model, sequences: list[Sequence], token_budget: int, folded: bool, on_batch=None, warm_up=False):
    """Score all sequences -> (list of ChoiceScore in their order, RunStats).

    `model` is a transformers causal language model in eval mode that `check_model` accepted. After each batch
    `on_batch(indices, scores)` is called. The time counts planning, folding, the model and `on_batch`; `warm_up`
    runs the smallest batch once before the clock starts.
    """
    stack, head = _stack_and_head(model)
    scores: list[ChoiceScore] = [None] * len(sequences)
    stats = RunStats()
    started = time.perf_counter()
    batches = (plan_folded if folded else plan_plain)(sequences, token_budget)
    planned = time.perf_counter() - started
    with _folding(model, threshold=0.95, verify="never") if folded else contextlib.nullcontext():
        if warm_up:
            smallest = min(batches, key=lambda batch: sum(sequences[i].length for i in batch))
            _score_batch(stack, head, [sequences[i] for i in smallest])
        rows_before = model.radix_stats.rows if folded else 0
        started = time.perf_counter() - planned
        for batch in batches:
            chosen = [sequences[i] for i in batch]
            found, head_rows = _score_batch(stack, head, chosen)
            for index, score in zip(batch, found, strict=True):
                scores[index] = score
            stats.tokens += sum(s.length for s in chosen)
            stats.rows += 0 if folded else len(chosen) * max(s.length for s in chosen)
            stats.head_rows += head_rows
            if on_batch:
                on_batch(batch, found)
        stats.seconds = time.perf_counter() - started
        stats.rows += model.radix_stats.rows - rows_before if folded else 0
    stats.batches = len(batches)
    return scores, stats


def _folding(model, **options):
    from radix_ops import hf

    return hf.folded(model, **options)


@torch.inference_mode()
def _score_batch(stack, head, sequences: list[Sequence]) -> tuple[list[ChoiceScore], int]:
    device = head.weight.device
    width = max(s.length for s in sequences)
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for index, sequence in enumerate(sequences):
        input_ids[index, : sequence.length] = sequence.inputs
        attention_mask[index, : sequence.length] = 1
    input_ids, attention_mask = (torch.from_numpy(x).to(device) for x in (input_ids, attention_mask))
    hidden = stack(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state  # [B, L, D]
    positions, row_of = _head_rows(sequences, width)
    rows = hidden.flatten(0, 1)[torch.from_numpy(positions).to(device)]  # [len(positions), D]
    targets = np.concatenate([s.continuation for s in sequences]).astype(np.int64)
    logprobs, greedy = _score_targets(head, rows, row_of, targets)
    ends = np.cumsum([len(s.continuation) for s in sequences])
    parts = zip(np.split(logprobs, ends[:-1]), np.split(greedy, ends[:-1]), strict=True)
    return [ChoiceScore(float(part.sum()), bool(hits.all())) for part, hits in parts], len(positions)


def _head_rows(sequences: list[Sequence], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the padded batch that need logits, and for each scored token which of them predicts it.

    Choices of one item that start alike share those positions: a small trie per item, rooted at its context's end.
    """
    nodes: dict[tuple[int, int], int] = {}
    positions, row_of = [], []
    for index, sequence in enumerate(sequences):
        start = len(sequence.context)
        # Negative first parts are roots; contexts of one item that were cut to the same length are the same.
        key = (-1 - sequence.item, start)
        for offset, token in enumerate(sequence.continuation.tolist()):
            row = nodes.setdefault(key, len(positions))
            if row == len(positions):
                positions.append(index * width + start - 1 + offset)
            row_of.append(row)
            key = (row, token)
    return np.asarray(positions, dtype=np.int64), np.asarray(row_of, dtype=np.int64)


def _score_targets(head, rows: torch.Tensor, row_of: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability (float64 array) and is-greedy (bool array) of targets[i] given rows[row_of[i]]."""
    logprobs, greedy = np.empty(len(targets)), np.empty(len(targets), dtype=bool)
    chunk = max(1, MAX_LOGIT_BYTES // (4 * head.weight.shape[0]))
    for first in range(0, len(rows), chunk):
        logits = head(rows[first : first + chunk]).float()  # [chunk, vocab]
        chosen = np.flatnonzero((row_of >= first) & (row_of < first + chunk))
        row = torch.from_numpy(row_of[chosen] - first).to(logits.device)
        target = torch.from_numpy(targets[chosen]).to(logits.device)
        logprobs[chosen] = logits.log_softmax(-1)[row, target].cpu().numpy()
        greedy[chosen] = (logits.argmax(-1)[row] == target).cpu().numpy()
    return logprobs, greedy


def result(item: Item, sequences: list[Sequence], scores: list[ChoiceScore]) -> dict:
    """The output object of one item; `best_per_char` divides by characters without leading white space (acc_norm).

    Of equal choices the first is the best. ScoreError for a log-probability that isn't finite.
    """
    logprobs = [score.logprob for score in scores]
    for number, value in enumerate(logprobs):
        _check_finite(item, number, value)
    lengths = [max(1, len(choice.lstrip())) for choice in item.choices]
    return {
        "line": item.line,
        **item.extra,
        "logprobs": logprobs,
        "tokens": [len(s.continuation) for s in sequences],
        "greedy": [score.is_greedy for score in scores],
        "best": int(np.argmax(logprobs)),
        "best_per_char": int(np.argmax(np.divide(logprobs, lengths))),
    }


def check_finite(items: list[Item], sequences: list[Sequence], scores: list[ChoiceScore]) -> None:
    """ScoreError naming the first choice whose log-probability isn't finite."""
    for sequence, score in zip(sequences, scores, strict=True):
        _check_finite(items[sequence.item], sequence.choice, score.logprob)


def _check_finite(item: Item, number: int, logprob: float) -> None:
    if not math.isfinite(logprob):
        raise ScoreError(f"{item.where}: choices[{number}] got the log-probability {logprob}; try --dtype float32")


def differences(items: list[Item], a: list[ChoiceScore], b: list[ChoiceScore]) -> tuple[int, float]:
    """Two scorings of all choices of `items` -> (items with the same best choice, largest log-prob difference)."""
    ends = np.cumsum([len(item.choices) for item in items])[:-1]
    left, right = (np.split(np.array([score.logprob for score in scores]), ends) for scores in (a, b))
    pairs = list(zip(left, right, strict=True))
    agree = sum(int(np.argmax(x) == np.argmax(y)) for x, y in pairs)
    return agree, float(max(np.abs(x - y).max() for x, y in pairs))
